import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vla.adapters.tabletop import observation, tabletop_contract
from vla.codec import Codec, CodecError
from vla.contract import PolicyContract
from vla.models import action_tokens
from vla.models.vision import ConvTower, ConvTowerConfig
from vla.policy import Policy, PolicyError
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import InstructionTokenizer, train_tokenizer
from vla.transforms import TransformError
from vla.types import Observation


def test_untrained_is_a_function_of_the_seed(policy: Policy, observations: list[Observation]) -> None:
    def weights(seed: int) -> torch.Tensor:
        args = (policy.model.config, policy.contract, policy.codec.statistics, policy.codec.tokenizer)
        return torch.cat([p.flatten() for p in Policy.untrained(*args, seed=seed).model.parameters()])

    before = torch.random.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert policy.contract.statistics_hash == policy.codec.statistics.hash


def test_act_answers_each_observation_within_the_bounds(policy: Policy, observations: list[Observation]) -> None:
    generator = torch.Generator().manual_seed(0)
    chunks = policy.act(observations, temperature=1.0, generator=generator)
    assert [chunk.stamp for chunk in chunks] == [observation.stamps["wrist"] for observation in observations]
    for chunk in chunks:
        assert chunk.actions.shape == (4, 7) and chunk.actions.dtype == np.float64
        assert np.abs(chunk.actions[:, :3]).max() <= 0.02 and np.abs(chunk.actions[:, 3:6]).max() <= 0.1
        assert chunk.actions[:, 6].min() >= 0 and chunk.actions[:, 6].max() <= 1
    assert policy.act([]) == []


def test_the_stamp_is_that_of_the_oldest_part(policy: Policy, observations: list[Observation]) -> None:
    seen = replace(observations[3], stamps={**observations[3].stamps, "wrist": 0.01, "unused": 0.0})
    assert policy.act([seen])[0].stamp == 0.01
    with pytest.raises(PolicyError) as error:
        policy.act([replace(seen, stamps={"wrist": 0.01})])
    assert error.value.codes == ("STAMP_MISSING",)


def test_evaluation_agrees_with_the_rollout(policy: Policy, observations: list[Observation]) -> None:
    inputs = policy.codec.encode(observations)
    decision = policy.sample(inputs, 0.7, torch.Generator().manual_seed(0))
    assert decision.tokens.shape == decision.log_probs.shape == (4, 4, 7)
    assert decision.tokens.dtype == torch.int64 and decision.log_probs.dtype == torch.float32
    assert decision.values.shape == (4, 1) and not decision.log_probs.requires_grad
    again = policy.sample(inputs, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(again.tokens, decision.tokens)
    evaluation = policy.evaluate_actions(inputs, decision.tokens.to(torch.int32), 0.7)
    torch.testing.assert_close(evaluation.log_probs, decision.log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(evaluation.values, decision.values, rtol=0, atol=1e-6)
    assert evaluation.entropy.shape == (4, 4, 7) and evaluation.auxiliary is not None
    evaluation.log_probs.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.model.parameters() if p.grad is not None)
    assert policy.model.action_head.weight.grad.abs().sum() > 0


def test_greedy_takes_the_most_likely_tokens(policy: Policy, observations: list[Observation]) -> None:
    inputs = policy.codec.encode(observations)
    decision = policy.sample(inputs, 0.0)
    logits = policy.model(*(torch.as_tensor(x) for x in (inputs.images, inputs.state, inputs.tokens))).logits
    assert torch.equal(decision.tokens, logits.argmax(-1))
    torch.testing.assert_close(decision.log_probs, logits.log_softmax(-1).amax(-1))


def test_uniforms_make_a_row_independent_of_its_batch(policy: Policy, observations: list[Observation]) -> None:
    inputs = policy.codec.encode(observations)
    uniforms = torch.rand(4, 4, 7, generator=torch.Generator().manual_seed(0))
    whole = policy.sample(inputs, 1.0, uniforms=uniforms)
    parts = [policy.sample(policy.codec.encode([o]), 1.0, uniforms=uniforms[i : i + 1])
             for i, o in enumerate(observations)]  # fmt: skip
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    with pytest.raises(ValueError, match="shape"):
        policy.sample(inputs, 1.0, uniforms=uniforms[:2])


def test_model_that_does_not_fit(
    policy: Policy, statistics: Statistics, offered: PolicyContract, tokenizer: InstructionTokenizer
) -> None:
    def codes(contract: PolicyContract, tokenizer: InstructionTokenizer, **change: Any) -> tuple[str, ...]:
        with pytest.raises(PolicyError) as error:
            Policy.untrained({**policy.model.config, **change}, contract, statistics, tokenizer, seed=0)
        return error.value.codes

    assert codes(offered, tokenizer, chunk=2) == ("MODEL_CONFIG",)
    assert codes(offered, tokenizer, state_dim=8) == ("MODEL_CONFIG",)
    assert codes(offered, tokenizer, cameras=1, vocabulary=200) == ("MODEL_CONFIG", "TOKENIZER_VOCABULARY")
    assert codes(offered, train_tokenizer(["go"], 300, 9)) == ("MODEL_CONFIG",)


class TestActionTokens:
    def test_samples_follow_the_distribution(self) -> None:
        logits = torch.tensor([0.0, 2.0, -math.inf, 1.0])
        drawn = action_tokens.sample(logits.expand(200_000, 4), 0.5, torch.Generator().manual_seed(0))
        frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(frequencies, (logits / 0.5).softmax(-1), rtol=0, atol=5e-3)
        assert frequencies[2] == 0

    def test_the_ends_of_the_unit_interval_never_give_an_impossible_token(self) -> None:
        logits = torch.tensor([-math.inf, 0.0, 0.1, 0.2, -math.inf]).expand(2, 5)
        drawn = action_tokens.sample(logits, 1.0, uniforms=torch.tensor([0.0, 1 - 2**-24]))
        assert drawn.tolist() == [1, 3]
        many = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
        last = torch.full((1000,), np.nextafter(1.0, 0.0), dtype=torch.float64)
        assert (action_tokens.sample(many, 1.0, uniforms=last) == 255).all()

    def test_bfloat16_logits_are_handled_in_float32(self) -> None:
        logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        tokens = action_tokens.sample(logits, 1.0, torch.Generator().manual_seed(1))
        for function, args in ((action_tokens.log_prob, (tokens, 0.8)), (action_tokens.entropy, (0.8,))):
            result = function(logits, *args)
            assert result.dtype == torch.float32 and torch.equal(result, function(logits.float(), *args))

    def test_entropy(self) -> None:
        logits = torch.tensor([[0.0] * 8, [0.0, 0.0, *[-math.inf] * 6]])
        expected = torch.tensor([math.log(8), math.log(2)])
        torch.testing.assert_close(action_tokens.entropy(logits, 3.0), expected)

    def test_temperature_zero_has_no_distribution(self) -> None:
        with pytest.raises(ValueError, match="temperature"):
            action_tokens.entropy(torch.zeros(1, 4), 0.0)


class TestCodec:
    def test_tokens_and_actions(self, policy: Policy) -> None:
        codec = policy.codec
        tokens = np.random.default_rng(0).integers(0, 31, (5, 4, 7)).astype(np.uint16)
        actions = codec.decode(tokens)
        assert actions.shape == tokens.shape and actions.dtype == np.float64
        assert np.array_equal(codec.encode_actions(actions), tokens)
        one = actions[2, 1, 3]
        center = -1 + (2 * int(tokens[2, 1, 3]) + 1) / 31
        assert one == pytest.approx(0.1 * center, abs=1e-15)
        assert np.array_equal(codec.decode(tokens[0]), actions[0])
        inside = np.random.default_rng(1).uniform(-0.02, 0.02, (100, 4, 7))
        error = np.abs(codec.decode(codec.encode_actions(inside)) - inside)[..., :3]
        assert error.max() <= 0.02 / 31 + 1e-12

    def test_state_is_normalised_and_clipped(self, policy: Policy, observations: list[Observation]) -> None:
        state = {**observations[0].state, "gripper_width": np.array([5.0])}
        state["eef_position"] = np.array([-0.9, 0.1, 1.1])
        inputs = policy.codec.encode([replace(observations[0], state=state)])
        assert inputs.state[0, [0, 1, 2, -1]].tolist() == [-1.0, 0.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("tokens", "reason"),
        [
            (np.full((4, 7), 32), "too large"),
            (np.full((4, 7), -1), "negative"),
            (np.zeros((4, 7)), "floats"),
            (np.zeros((7, 4), int), "shape"),
        ],
    )
    def test_bad_tokens(self, policy: Policy, tokens: np.ndarray, reason: str) -> None:
        with pytest.raises(CodecError) as error:
            policy.codec.decode(tokens)
        assert error.value.codes == ("ACTION_TOKENS",), reason

    def test_bad_observations(self, policy: Policy, observations: list[Observation]) -> None:
        good = observations[0]
        wrist, width = good.images["wrist"], good.state["gripper_width"]
        cases: list[tuple[str, Observation]] = [
            ("CAMERA_MISSING", replace(good, images={"wrist": wrist})),
            ("IMAGE", replace(good, images={**good.images, "wrist": wrist[:31]})),
            ("IMAGE", replace(good, images={**good.images, "wrist": wrist / 255})),
            ("STATE_FIELD", replace(good, state={"gripper_width": width})),
            ("STATE_FIELD", replace(good, state={**good.state, "gripper_width": np.zeros(2)})),
            ("STATE_NOT_FINITE", replace(good, state={**good.state, "gripper_width": width * np.nan})),
            ("INSTRUCTION", replace(good, instruction="")),
        ]
        for code, bad in cases:
            with pytest.raises((CodecError, TransformError)) as error:
                policy.codec.encode([good, bad])
            assert error.value.codes == (code,)
        with pytest.raises(CodecError):
            policy.codec.encode_actions(np.full((4, 7), np.nan))

    def test_statistics_beyond_the_bounds_of_the_contract(
        self, offered: PolicyContract, statistics: Statistics, tokenizer: InstructionTokenizer
    ) -> None:
        wide = ArrayStatistics.from_bounds([-0.03] * 7, [0.03] * 7)
        with pytest.raises(CodecError) as error:
            Codec.create(offered, replace(statistics, action=wide), tokenizer, 32)
        assert error.value.codes == ("ACTION_BOUND",)
        with pytest.raises(CodecError) as error:
            Codec.create(offered, replace(statistics, state=wide), tokenizer, 32)
        assert error.value.codes == ("STATISTICS_SIZE",)

    def test_resize_is_part_of_the_codec_when_asked_for(
        self,
        offered: PolicyContract,
        statistics: Statistics,
        tokenizer: InstructionTokenizer,
        observations: list[Observation],
    ) -> None:
        codec = Codec.create(offered, statistics, tokenizer, 32, resize=(16, 24))
        images = codec.encode(observations).images
        assert images.shape == (4, 2, 16, 24, 3)
        assert np.array_equal(images[1, 0], codec.inputs.images[1].forward(observations[1].images["third_person"]))

    def test_is_cheap(self, tokenizer: InstructionTokenizer) -> None:
        """16 observations of two 64 px images below 0.5 ms, as simulators need; the best of 50 counts."""
        contract = tabletop_contract(image_size=64, chunk=8, max_translation=0.02, max_rotation=0.1)
        action = ArrayStatistics.from_bounds([-0.02] * 6 + [0.0], [0.02] * 6 + [1.0])
        state = ArrayStatistics.from_bounds([-1.0] * contract.state_size, [1.0] * contract.state_size)
        codec = Codec.create(contract, Statistics(action, state), tokenizer, 256)
        image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        raw = {
            "third_person": image,
            "wrist": image,
            "eef_pos": [0.5, 0, 0.2],
            "commanded_pos": [0.5, 0, 0.2],
            "eef_quat_wxyz": [0, 1, 0, 0],
            "gripper_width": 0.04,
            "time": 0.0,
        }
        batch = [observation(raw, "put the carrot on the plate") for _ in range(16)]
        tokens = np.zeros((16, 8, 7), np.uint16)
        encode, decode = [], []
        for _ in range(50):
            start = time.perf_counter()
            codec.encode(batch)
            middle = time.perf_counter()
            codec.decode(tokens)
            encode.append(middle - start)
            decode.append(time.perf_counter() - middle)
        assert min(encode) < 0.5e-3 and min(decode) < 0.1e-3


@pytest.mark.parametrize("size", [64, 66])
def test_fine_heat_maps_have_twice_the_resolution(size: int) -> None:
    with pytest.raises(ValueError, match="two widths or more"):
        ConvTowerConfig(widths=(8,))
    tower = ConvTower(ConvTowerConfig(size, (8, 16), keypoints=1, fine=8), 4, 8)
    coarse = ConvTower(ConvTowerConfig(size, (8, 16), keypoints=1, fine=0), 4, 8)
    image = torch.zeros(1, 3, size, size)
    image[..., 31, 31] = 5.0
    maps: list[torch.Tensor] = []
    for each in (tower, coarse):
        each.heatmaps.register_forward_hook(lambda module, inputs, output: maps.append(output))
        each(image, torch.zeros(1, 4))
    assert [m.shape[-1] for m in maps] == [size // 2, -(-size // 4)]
    tokens, points = tower(image, torch.zeros(1, 4))
    assert tokens.shape == (1, 1, 8) and points.shape == (1, 1, 4) and points[..., :2].abs().max() <= 1


def test_perception_is_the_auxiliary_output_and_depends_on_its_own_parameters(
    policy: Policy, observations: list[Observation]
) -> None:
    model = policy.model
    inputs = [torch.as_tensor(x) for x in vars(policy.codec.encode(observations)).values()]
    located = model.perceive(*inputs)
    torch.testing.assert_close(located, model(*inputs).auxiliary)
    located.square().sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    seeing = {n for n, p in model.named_parameters() if any(p is q for q in model.seeing())}
    assert touched == seeing | {"language_model.embed_tokens.weight"}


def test_what_was_seen_takes_the_place_of_the_images(policy: Policy, observations: list[Observation]) -> None:
    model = policy.model
    inputs = policy.codec.encode(observations)
    images, state, tokens = (torch.as_tensor(x) for x in vars(inputs).values())
    drawn = policy.sample(inputs, 1.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = model.see(images, state, tokens)
    looked = policy.evaluate_actions(inputs, drawn.tokens, 1.0)
    spared = policy.evaluate_actions(inputs, drawn.tokens, 1.0, seen, entropy_gradient=False)
    torch.testing.assert_close(spared.log_probs, looked.log_probs)
    torch.testing.assert_close(spared.auxiliary, looked.auxiliary)
    assert looked.entropy.requires_grad and not spared.entropy.requires_grad
    spared.log_probs.sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None}
    behind = {n for n, p in model.named_parameters() if any(p is q for q in model.behind_seen())}
    assert touched == {name for name in behind if not name.startswith("value_head")}
    assert not any(name.startswith(("vision_backbone", "locator")) for name in behind)


def test_told_positions_take_the_place_of_those_found(policy: Policy, observations: list[Observation]) -> None:
    model = policy.model
    inputs = [torch.as_tensor(x) for x in vars(policy.codec.encode(observations)).values()]
    free = model(*inputs)
    found = free.auxiliary[:, :9].detach()
    told = found.clone()
    told[0] += 0.5
    told[1] = torch.nan
    changed = model(*inputs, told)
    assert (changed.logits[0] != free.logits[0]).any()
    torch.testing.assert_close(changed.logits[1:], free.logits[1:])
    torch.testing.assert_close(changed.auxiliary, free.auxiliary)
