"""Transforms between canonical observations and actions and the numbers of a model.

Each one is a frozen dataclass that says how much of it can be undone:
- bijective: `inverse(forward(x)) == x` for every x;
- invertible_on_range: the same for x in a stated range only;
- one_way: it can't be undone.
`to_data` and `from_data` write and read them with the checkpoint; `verify` runs the round trip on `probes()`.
Arithmetic is float64 and elementwise, so that every machine gets the same bits.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vla import schema
from vla.errors import CodedError, Fault
from vla.statistics import ArrayStatistics

Kind = Literal["bijective", "invertible_on_range", "one_way"]


class TransformError(CodedError):
    """A transform is malformed, or its input is not what it takes."""


@runtime_checkable
class ArrayTransform(Protocol):
    """A transform of columns, `[..., D]` -> `[..., D]`; each column depends on the same column only."""

    @property
    def kind(self) -> Kind: ...
    def forward(self, values: np.ndarray) -> np.ndarray: ...
    def inverse(self, values: np.ndarray) -> np.ndarray: ...
    def probes(self) -> np.ndarray:
        """Values `[N, D]` that a round trip must give back."""


class ImageTransform(Protocol):
    """A transform of one uint8 RGB image `[H, W, 3]`. output_size: height and width of what comes out."""

    @property
    def kind(self) -> Kind: ...
    @property
    def output_size(self) -> tuple[int, int]: ...
    def forward(self, image: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class QuantileNormalize:
    """q01 -> -1 and q99 -> 1 where the mask is True; other columns stay as they are.

    clip: values outside the quantiles go to -1 or 1. A column with q01 = q99 becomes 0.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    clip: bool

    def __post_init__(self) -> None:
        sizes_agree = len(self.q01) == len(self.q99) == len(self.mask) > 0
        if not sizes_agree or not all(low <= high for low, high in zip(self.q01, self.q99, strict=True)):
            remedy = "Build it from statistics with QuantileNormalize.of."
            raise TransformError(
                Fault(
                    "QUANTILES",
                    "QuantileNormalize",
                    "q01 <= q99 of one size",
                    f"{self.q01}, {self.q99}",
                    remedy,
                )
            )

    @staticmethod
    def of(statistics: ArrayStatistics, clip: bool) -> "QuantileNormalize":
        return QuantileNormalize(statistics.q01, statistics.q99, statistics.mask, clip)

    @property
    def kind(self) -> Kind:
        spread = all(b > a for a, b, on in zip(self.q01, self.q99, self.mask, strict=True) if on)
        return "bijective" if spread and not self.clip else "invertible_on_range"

    def forward(self, values: np.ndarray) -> np.ndarray:
        low, width, mask = _columns(self)
        scaled = 2.0 * (values - low) / np.where(width > 0, width, 1.0) - 1.0
        scaled = np.where(width > 0, scaled, 0.0)
        return np.where(mask, np.clip(scaled, -1.0, 1.0) if self.clip else scaled, values)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        low, width, mask = _columns(self)
        return np.where(mask, 0.5 * (values + 1.0) * width + low, values)

    def probes(self) -> np.ndarray:
        low, width, _ = _columns(self)
        return low + np.linspace(0.0, 1.0, 7)[:, None] * width


@lru_cache(maxsize=64)
def _columns(transform: QuantileNormalize) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower bound, width and mask as arrays `[D]`."""
    low = np.array(transform.q01, np.float64)
    return low, np.array(transform.q99, np.float64) - low, np.array(transform.mask, bool)


@dataclass(frozen=True)
class Standardize:
    """(x - mean) / (std + 1e-8) where the mask is True, as pi0's processors do; other columns stay as they are."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mask: tuple[bool, ...]
    kind: ClassVar[Kind] = "bijective"

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == len(self.mask) > 0 or not all(s >= 0 for s in self.std):
            found, remedy = f"{self.mean}, {self.std}", "Build it from statistics with Standardize.of."
            raise TransformError(Fault("DEVIATIONS", "Standardize", "std >= 0, of one size with mean", found, remedy))

    @staticmethod
    def of(statistics: ArrayStatistics) -> "Standardize":
        return Standardize(statistics.mean, statistics.std, statistics.mask)

    def forward(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.mask, (values - np.array(self.mean)) / (np.array(self.std) + 1e-8), values)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return np.where(self.mask, values * (np.array(self.std) + 1e-8) + np.array(self.mean), values)

    def probes(self) -> np.ndarray:
        return np.array(self.mean) + np.linspace(-2.0, 2.0, 7)[:, None] * np.array(self.std)


@dataclass(frozen=True)
class UniformBins:
    """Values in [-1, 1] <-> action tokens 0 .. n_bins - 1, as OpenVLA does (arXiv 2406.09246).

    `n_bins` edges make `n_bins - 1` bins; the last token is for values of 1 and more and means the last
    centre.
    OpenVLA's vocabulary id of token b is 31999 - b. The range on which it is exact are the centres.
    """

    n_bins: int
    kind: ClassVar[Kind] = "invertible_on_range"

    def __post_init__(self) -> None:
        if not 3 <= self.n_bins <= 65536:
            remedy = "Choose the number of bins of the model."
            raise TransformError(Fault("BINS", "UniformBins.n_bins", "3 to 65536", repr(self.n_bins), remedy))

    @property
    def centers(self) -> np.ndarray:
        """`[n_bins]`, one centre for each token."""
        edges = np.linspace(-1.0, 1.0, self.n_bins)
        middle = (edges[:-1] + edges[1:]) / 2.0
        return np.append(middle, middle[-1])

    def forward(self, values: np.ndarray) -> np.ndarray:
        tokens = np.digitize(np.clip(values, -1.0, 1.0), np.linspace(-1.0, 1.0, self.n_bins)) - 1
        return tokens.astype(np.int64)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        return self.centers[values]

    def probes(self) -> np.ndarray:
        return self.centers[:-1, None]


@dataclass(frozen=True)
class ImageCheck:
    """Passes uint8 RGB images of exactly this size and refuses all others."""

    height: int
    width: int
    kind: ClassVar[Kind] = "bijective"

    @property
    def output_size(self) -> tuple[int, int]:
        return self.height, self.width

    def forward(self, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint8 or image.shape != (self.height, self.width, 3):
            expected, found = f"uint8 ({self.height}, {self.width}, 3)", f"{image.dtype} {image.shape}"
            remedy = "Render or crop the image as the contract says; it is not resized on the way."
            raise TransformError(Fault("IMAGE", "image", expected, found, remedy))
        return image


@dataclass(frozen=True)
class ImageResize:
    """Pillow's bicubic, antialiased resize; off unless the checkpoint names it."""

    height: int
    width: int
    kind: ClassVar[Kind] = "one_way"

    @property
    def output_size(self) -> tuple[int, int]:
        return self.height, self.width

    def forward(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((self.width, self.height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class InstructionFormat:
    """Fills the prompt: `{task}` becomes the sentence, stripped and, if asked, lower-cased."""

    template: str
    lowercase: bool
    kind: ClassVar[Kind] = "one_way"

    def forward(self, instruction: str) -> str:
        sentence = instruction.strip()
        if not sentence:
            remedy = "Tell the robot what to do."
            raise TransformError(Fault("INSTRUCTION", "instruction", "a sentence", "nothing", remedy))
        return self.template.replace("{task}", sentence.lower() if self.lowercase else sentence)


REGISTRY: dict[str, type] = {
    cls.__name__: cls
    for cls in (QuantileNormalize, Standardize, UniformBins, ImageCheck, ImageResize, InstructionFormat)
}


def to_data(transform: Any) -> dict[str, Any]:
    """Plain data: the type's name and its fields."""
    return {"type": type(transform).__name__, **asdict(transform)}


def from_data(data: Any, where: str) -> Any:
    """The transform described by `data`; an unknown type or field is an error. Verifies the round trip."""
    name = data.get("type") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in REGISTRY:
        remedy = "Load the checkpoint with the version that wrote it, or register the transform."
        raise TransformError(Fault("TRANSFORM_TYPE", where, f"one of {sorted(REGISTRY)}", repr(name), remedy))
    rest = {key: value for key, value in data.items() if key != "type"}
    transform: Any = schema.build(REGISTRY[name], rest, where, TransformError)
    if isinstance(transform, ArrayTransform):
        verify(transform, where)
    return transform


def verify(transform: ArrayTransform, where: str) -> None:
    """Raise TransformError unless the round trip gives the probes back, to 1e-9 of each column's spread."""
    if transform.kind == "one_way":
        return
    with np.errstate(all="ignore"):  # broken parameters overflow; the comparison below reports them
        probes = transform.probes()
        error = np.abs(transform.inverse(transform.forward(probes)) - probes)
    limit = 1e-9 * np.maximum(np.ptp(probes, axis=0), np.finfo(np.float64).tiny)
    limit = np.where(np.ptp(probes, axis=0) > 0, limit, 1e-9 * np.abs(probes).max(axis=0))
    if not (error <= limit).all():
        remedy = "The parameters are damaged or lose precision: compute the statistics again in SI units."
        found = f"an error of {np.max(error):g}"
        raise TransformError(Fault("ROUND_TRIP", where, "inverse(forward(x)) = x", found, remedy))


def run_forward(chain: Sequence[ArrayTransform], values: np.ndarray) -> np.ndarray:
    for transform in chain:
        values = transform.forward(values)
    return values


def run_inverse(chain: Sequence[ArrayTransform], values: np.ndarray) -> np.ndarray:
    for transform in reversed(chain):
        values = transform.inverse(values)
    return values
