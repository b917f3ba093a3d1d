import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vla.statistics import ArrayStatistics, Statistics, StatisticsError
from vla.transforms import (
    ImageCheck,
    ImageResize,
    InstructionFormat,
    QuantileNormalize,
    Standardize,
    TransformError,
    UniformBins,
    from_data,
    run_forward,
    run_inverse,
    to_data,
    verify,
)

REFERENCE = Path(__file__).parent / "data" / "openvla_decoding.json"


def test_quantiles_go_to_plus_and_minus_one() -> None:
    step = QuantileNormalize((-2.0, 0.0), (4.0, 1.0), (True, False), clip=True)
    values = np.array([[-2.0, 5.0], [4.0, -5.0], [1.0, 0.3], [9.0, 7.0]])
    assert step.forward(values).tolist() == [[-1.0, 5.0], [1.0, -5.0], [0.0, 0.3], [1.0, 7.0]]
    assert step.inverse(step.forward(values[:3])).tolist() == values[:3].tolist()


def test_moments_go_to_zero_and_one() -> None:
    step = Standardize((0.5, 3.0), (0.1, 2.0), (True, False))
    values = np.array([[0.5, 5.0], [0.6, -5.0], [0.2, 0.3]])
    np.testing.assert_allclose(step.forward(values), [[0.0, 5.0], [1.0, -5.0], [-3.0, 0.3]], atol=1e-6)
    np.testing.assert_allclose(step.inverse(step.forward(values)), values, rtol=1e-12)
    normal = ArrayStatistics.from_moments((0.5,), (0.1,))
    assert Standardize.of(normal) == Standardize((0.5,), (0.1,), (True,))
    drawn = np.random.default_rng(0).normal(0.5, 0.1, 100_000)
    np.testing.assert_allclose([normal.q01[0], normal.q99[0]], np.quantile(drawn, (0.01, 0.99)), atol=3e-3)
    with pytest.raises(TransformError, match="std >= 0"):
        Standardize((0.5,), (-0.1,), (True,))


def test_kind_says_what_can_be_undone() -> None:
    bounds = ((-1.0, 0.0), (1.0, 3.0), (True, True))
    assert QuantileNormalize(*bounds, clip=False).kind == "bijective"
    assert QuantileNormalize(*bounds, clip=True).kind == "invertible_on_range"
    constant = QuantileNormalize((0.5, 0.0), (0.5, 3.0), (True, True), clip=False)
    assert constant.kind == "invertible_on_range"
    assert constant.forward(np.array([7.0, 3.0])).tolist() == [0.0, 1.0]
    assert constant.inverse(np.array([0.9, 1.0])).tolist() == [0.5, 3.0]
    far = np.random.default_rng(0).normal(0, 100, (50, 2))
    bijective = QuantileNormalize(*bounds, clip=False)
    np.testing.assert_allclose(bijective.inverse(bijective.forward(far)), far, rtol=1e-12)


@pytest.mark.parametrize("n_bins", [3, 32, 256])
def test_bins_follow_openvla(n_bins: int) -> None:
    """Against the formulas of the original, with ids instead of tokens: id = 32000 - digitize."""
    bins = UniformBins(n_bins)
    edges = np.linspace(-1, 1, n_bins)
    centers = (edges[:-1] + edges[1:]) / 2
    values = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 2000), edges, [-1.0, 1.0]])
    ids = 32000 - np.digitize(np.clip(values, -1, 1), edges)
    tokens = bins.forward(values)
    assert np.array_equal(31999 - tokens, ids)
    assert np.array_equal(bins.inverse(tokens), centers[np.clip(31999 - ids, 0, n_bins - 2)])
    assert tokens.min() == 0 and tokens.max() == n_bins - 1
    inside = np.abs(values) <= 1
    assert np.abs(bins.inverse(tokens) - values)[inside].max() <= (edges[1] - edges[0]) / 2 + 1e-12


def test_decoding_equals_the_original_openvla() -> None:
    data = json.loads(REFERENCE.read_text())
    normalize = QuantileNormalize(tuple(data["q01"]), tuple(data["q99"]), tuple(data["mask"]), clip=False)
    assert len(data["samples"]) == 3
    for sample in data["samples"]:
        tokens = 31999 - np.array(sample["action_token_ids"])
        actions = run_inverse((normalize,), UniformBins(256).inverse(tokens))
        np.testing.assert_allclose(actions, sample["actions"], rtol=0, atol=1e-12)


def test_image_check_refuses_every_other_image() -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    check = ImageCheck(32, 48)
    assert check.forward(image) is image
    for wrong in (image[:, :, :1], image[:31], image.astype(np.float32), image.swapaxes(0, 1), image[None]):
        with pytest.raises(TransformError) as error:
            check.forward(wrong)
        assert error.value.codes == ("IMAGE",)


@pytest.mark.parametrize(("source", "target"), [((60, 80), (32, 32)), ((24, 24), (32, 40))])
def test_resize_agrees_with_pil(source: tuple[int, int], target: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    resized = ImageResize(*target).forward(image)
    reference = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BICUBIC))
    assert resized.dtype == np.uint8 and resized.shape == (*target, 3)
    assert np.abs(resized.astype(int) - reference.astype(int)).max() <= 2


def test_instruction_format() -> None:
    openvla = InstructionFormat("In: What action should the robot take to {task}?\nOut: ", lowercase=True)
    assert openvla.forward(" Lift the Mug ") == "In: What action should the robot take to lift the mug?\nOut: "
    assert InstructionFormat("{task}", lowercase=False).forward("Lift {task}") == "Lift {task}"
    with pytest.raises(TransformError):
        openvla.forward("  ")


TRANSFORMS = (
    QuantileNormalize((-0.1, 0.3), (0.7, 0.3), (True, False), clip=False),
    Standardize((0.1, 0.2), (0.3, 0.0), (True, False)),
    UniformBins(256),
    ImageCheck(64, 64),
    ImageResize(224, 224),
    InstructionFormat("{task}", lowercase=True),
)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_json_round_trip(transform: Any) -> None:
    data = json.loads(json.dumps(to_data(transform)))
    assert from_data(data, "here") == transform
    with pytest.raises(TransformError) as error:
        from_data(data | {"extra": 1}, "here")
    assert error.value.codes == ("UNKNOWN_KEY",)
    with pytest.raises(TransformError) as error:
        from_data({"type": data["type"]}, "here")
    assert set(error.value.codes) == {"MISSING_KEY"}


@pytest.mark.parametrize("data", [{"type": "Pickle"}, {"q01": []}, None, [], {"type": ["UniformBins"]}])
def test_unknown_transforms_are_refused(data: Any) -> None:
    with pytest.raises(TransformError) as error:
        from_data(data, "here")
    assert error.value.codes == ("TRANSFORM_TYPE",)


@pytest.mark.parametrize(
    ("q01", "q99", "code"),
    [([1.0], [0.0], "QUANTILES"), ([0.0, 1.0], [1.0], "QUANTILES"), ([-1e308], [1e308], "ROUND_TRIP")],
)
def test_damaged_parameters_fail_at_load(q01: list[float], q99: list[float], code: str) -> None:
    data = {"type": "QuantileNormalize", "q01": q01, "q99": q99, "mask": [True], "clip": False}
    with pytest.raises(TransformError) as error:
        from_data(data, "here")
    assert error.value.codes == (code,)


def test_round_trip_check_sees_a_wrong_inverse() -> None:
    class Wrong(QuantileNormalize):
        def inverse(self, values: np.ndarray) -> np.ndarray:
            return super().inverse(values) + 1e-6

    with pytest.raises(TransformError) as error:
        verify(Wrong((0.0,), (1.0,), (True,), clip=False), "here")
    assert error.value.codes == ("ROUND_TRIP",)


def test_chains_run_forward_and_backward() -> None:
    chain = (
        QuantileNormalize((0.0,), (2.0,), (True,), clip=False),
        QuantileNormalize((-1.0,), (3.0,), (True,), clip=False),
    )
    assert run_forward(chain, np.array([2.0])).tolist() == [0.0]
    assert run_inverse(chain, np.array([0.0])).tolist() == [2.0]


def test_statistics_of_data() -> None:
    values = np.random.default_rng(0).normal(size=(1000, 3)) * [1.0, 2.0, 0.0]
    columns = ArrayStatistics.compute(values, mask=[True, True, False], ranges={2: (0.0, 1.0)})
    np.testing.assert_allclose(columns.q01[:2], np.quantile(values[:, :2], 0.01, axis=0))
    np.testing.assert_allclose(columns.std, values.std(axis=0))
    assert (columns.q01[2], columns.q99[2]) == (0.0, 1.0) and columns.mask == (True, True, False)


def test_statistics_hash_follows_the_content() -> None:
    columns = ArrayStatistics.from_bounds([-1, 0], [1, 2])
    statistics = Statistics(columns, columns)
    copy = Statistics.from_json(statistics.to_json())
    assert copy == statistics and copy.hash == statistics.hash and len(copy.hash) == 64
    assert Statistics(columns, ArrayStatistics.from_bounds([-1, 0], [1, np.nextafter(2, 3)])).hash != copy.hash


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]]), np.array([[np.inf]])])
def test_statistics_refuse_bad_data(values: np.ndarray) -> None:
    with pytest.raises(StatisticsError) as error:
        ArrayStatistics.compute(values)
    assert error.value.codes == ("STATISTICS_DATA",)
