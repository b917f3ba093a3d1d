"""Codec: observations -> model inputs and action tokens -> actions, in numpy, without the model.

It runs in the environment's process, on the robot and in replay; that all three use this one object is what
makes them bit-equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.contract import PolicyContract
from vla.errors import CodedError, Fault
from vla.statistics import ArrayStatistics, Statistics
from vla.tokenizer import InstructionTokenizer
from vla.transforms import (
    ArrayTransform,
    ImageCheck,
    ImageResize,
    InstructionFormat,
    QuantileNormalize,
    Standardize,
    UniformBins,
    run_forward,
    run_inverse,
)
from vla.types import ModelInputs, Observation


class CodecError(CodedError):
    """The parts of a codec don't fit each other, or an observation or a token is not what it takes."""


@dataclass(frozen=True)
class InputTransforms:
    """images: one chain for all cameras. state: a chain on `[B, S]`. instruction: the prompt."""

    images: tuple[ImageCheck | ImageResize, ...]
    state: tuple[ArrayTransform, ...]
    instruction: InstructionFormat


@dataclass(frozen=True)
class OutputTransforms:
    """From actions in the contract's units to tokens. action: a chain on `[..., D]`; decoding inverts it."""

    action: tuple[ArrayTransform, ...]
    bins: UniformBins


class Codec:
    """Everything about a policy but its model. Cheap to pickle and to run."""

    def __init__(
        self,
        contract: PolicyContract,
        statistics: Statistics,
        inputs: InputTransforms,
        outputs: OutputTransforms,
        tokenizer: InstructionTokenizer,
    ) -> None:
        self.contract = contract
        self.statistics = statistics
        self.inputs = inputs
        self.outputs = outputs
        self.tokenizer = tokenizer
        faults = _inconsistent(self)
        if faults:
            raise CodecError(*faults)
        size = inputs.images[-1].output_size
        self.image_shape = (len(contract.cameras), *size, 3)
        self.action_shape = (contract.action.chunk, contract.action.dim)
        self.n_bins = outputs.bins.n_bins
        stops = np.cumsum([0, *(field.size for field in contract.state)])
        self._slices = [
            (field.name, field.shape, slice(int(stops[i]), int(stops[i + 1]))) for i, field in enumerate(contract.state)
        ]
        self._check_only = len(inputs.images) == 1 and isinstance(inputs.images[0], ImageCheck)
        centers = np.repeat(outputs.bins.centers[:, None], contract.action.dim, axis=1)
        self._table = run_inverse(outputs.action, centers)  # [n_bins, D]
        self._columns = np.arange(contract.action.dim)
        faults = _out_of_bounds(contract, self._table)
        if faults:
            raise CodecError(*faults)

    @staticmethod
    def create(
        contract: PolicyContract,
        statistics: Statistics,
        tokenizer: InstructionTokenizer,
        n_bins: int,
        resize: tuple[int, int] | None = None,
        lowercase: bool = True,
    ) -> "Codec":
        """The usual chains: exact image size, quantile normalisation, uniform bins.

        The contract takes over the hash of the statistics.
        resize: height and width of the model's images where they differ from the cameras'.
        """
        height, width = next(((c.height, c.width) for c in contract.cameras), (0, 0))
        images: tuple[ImageCheck | ImageResize, ...] = (ImageCheck(height, width),)
        if resize is not None:
            images = (*images, ImageResize(*resize))
        return Codec(
            contract.with_statistics(statistics.hash),
            statistics,
            InputTransforms(
                images,
                (QuantileNormalize.of(statistics.state, clip=True),) if statistics.state.size else (),
                InstructionFormat(contract.instruction.template, lowercase),
            ),
            OutputTransforms((QuantileNormalize.of(statistics.action, clip=False),), UniformBins(n_bins)),
            tokenizer,
        )

    def encode(self, observations: Sequence[Observation], images: np.ndarray | None = None) -> ModelInputs:
        """A row for each observation: images `[B, K, H, W, 3]`, state `[B, S]`, tokens `[B, L]`.

        images: where to write them, if they have a place already.
        """
        count = len(observations)
        images = np.empty((count, *self.image_shape), np.uint8) if images is None else images
        state = np.empty((count, self.contract.state_size), np.float64)
        tokens = np.empty((count, self.tokenizer.length), np.int64)
        prompt: dict[str, np.ndarray] = {}
        for i, seen in enumerate(observations):
            self._fill_images(images[i], seen)
            self._fill_state(state[i], seen)
            ids = prompt.get(seen.instruction)
            if ids is None:
                ids = self.tokenizer.encode(self.inputs.instruction.forward(seen.instruction))
                prompt[seen.instruction] = ids
            tokens[i] = ids
        if not np.isfinite(state).all():
            row = int(np.flatnonzero(~np.isfinite(state).all(axis=1))[0])
            remedy = "Read the sensors again; a missing reading must not be sent as NaN."
            raise CodecError(
                Fault(
                    "STATE_NOT_FINITE",
                    f"observations[{row}].state",
                    "finite numbers",
                    str(state[row]),
                    remedy,
                )
            )
        return ModelInputs(images, run_forward(self.inputs.state, state).astype(np.float32), tokens)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Integer tokens `[..., C, D]` to actions in the contract's units, float64 of the same shape."""
        array = np.asarray(tokens)
        if not np.issubdtype(array.dtype, np.integer) or array.shape[-2:] != self.action_shape:
            expected, found = f"integers [..., {self.action_shape}]", f"{array.dtype} {array.shape}"
            remedy = "Pass the tokens as the model gave them."
            raise CodecError(Fault("ACTION_TOKENS", "tokens", expected, found, remedy))
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self.n_bins):
            expected, found = f"0 to {self.n_bins - 1}", f"{int(array.min())} to {int(array.max())}"
            remedy = "The model and the codec have different numbers of bins, or the buffer is stale."
            raise CodecError(Fault("ACTION_TOKENS", "tokens", expected, found, remedy))
        return self._table[array, self._columns]

    def denormalize(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions `[..., C, D]` of a regression to the contract's units, float64 of the same shape."""
        values = np.asarray(actions, np.float64)
        if values.shape[-2:] != self.action_shape:
            remedy = "The model and the contract have different chunks or actions."
            raise CodecError(Fault("ACTIONS", "actions", str(self.action_shape), f"{values.shape}", remedy))
        return run_inverse(self.outputs.action, values)

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions in the contract's units `[..., D]` to int64 tokens; beyond the range, the outermost."""
        return self.outputs.bins.forward(self.normalize(actions))

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Actions in the contract's units `[..., D]` to what a regression gives, float64 of the same shape."""
        values = np.asarray(actions, np.float64)
        if values.shape[-1:] != self.action_shape[-1:] or not np.isfinite(values).all():
            expected = f"finite numbers [..., {self.action_shape[-1]}]"
            remedy = "Check the demonstration or the controller that produced them."
            raise CodecError(Fault("ACTIONS", "actions", expected, f"shape {values.shape}", remedy))
        return run_forward(self.outputs.action, values)

    def _fill_images(self, out: np.ndarray, seen: Observation) -> None:
        """Write the images of one observation to `out` `[K, H, W, 3]`."""
        for k, camera in enumerate(self.contract.cameras):
            image = seen.images.get(camera.name)
            if image is None:
                remedy = "Provide the image in the adapter; the contract lists the cameras."
                raise CodecError(Fault("CAMERA_MISSING", camera.name, "an image", str([*seen.images]), remedy))
            if self._check_only:
                if image.shape != out.shape[1:] or image.dtype != np.uint8:
                    self.inputs.images[0].forward(image)  # raises
                out[k] = image
            else:
                for transform in self.inputs.images:
                    image = transform.forward(image)
                out[k] = image

    def _fill_state(self, out: np.ndarray, seen: Observation) -> None:
        """Write the state fields of one observation to `out` `[S]`."""
        for name, shape, part in self._slices:
            value = seen.state.get(name)
            if value is None or value.shape != shape:
                found = f"{[*seen.state]}" if value is None else f"shape {value.shape}"
                remedy = "Provide the field in the adapter as the contract says."
                raise CodecError(Fault("STATE_FIELD", name, f"shape {shape}", found, remedy))
            out[part] = value.reshape(-1)


def _inconsistent(codec: Codec) -> list[Fault]:
    """Differences between the contract, the statistics and the transforms."""
    contract, statistics = codec.contract, codec.statistics
    sizes = {(c.height, c.width) for c in contract.cameras}
    facts: list[tuple[str, str, Any, Any]] = [
        ("STATISTICS_HASH", "contract.statistics_hash", statistics.hash, contract.statistics_hash),
        ("STATISTICS_SIZE", "statistics.action", contract.action.dim, statistics.action.size),
        ("STATISTICS_SIZE", "statistics.state", contract.state_size, statistics.state.size),
        (
            "INSTRUCTION_TEMPLATE",
            "inputs.instruction.template",
            contract.instruction.template,
            codec.inputs.instruction.template,
        ),
        ("IMAGE_SIZES", "contract.cameras", min(1, len(contract.cameras)), len(sizes)),
        ("IMAGE_CHAIN", "inputs.images", True, _image_chain_fits(codec)),
    ]
    chains: tuple[tuple[str, tuple[ArrayTransform, ...], ArrayStatistics], ...] = (
        ("inputs.state", codec.inputs.state, statistics.state),
        ("outputs.action", codec.outputs.action, statistics.action),
    )
    for where, chain, columns in chains:
        fits = all(isinstance(step, ArrayTransform) and not isinstance(step, UniformBins) for step in chain)
        facts.append(("CHAIN", where, "transforms of columns", "transforms of columns" if fits else repr(chain)))
        for step in chain:
            if isinstance(step, QuantileNormalize):
                expected = (columns.q01, columns.q99, columns.mask)
                facts.append(("STATISTICS_TRANSFORM", where, expected, (step.q01, step.q99, step.mask)))
            if isinstance(step, Standardize):
                expected = (columns.mean, columns.std, columns.mask)
                facts.append(("STATISTICS_TRANSFORM", where, expected, (step.mean, step.std, step.mask)))
    remedy = "Build the codec with Codec.create, or load an unchanged checkpoint."
    return [Fault(code, where, repr(want), repr(have), remedy) for code, where, want, have in facts if want != have]


def _image_chain_fits(codec: Codec) -> bool:
    """The chain starts with a check of the size that the contract names."""
    cameras, chain = codec.contract.cameras, codec.inputs.images
    if not chain or not isinstance(chain[0], ImageCheck):
        return False
    if not all(isinstance(step, ImageCheck | ImageResize) for step in chain):
        return False
    return all(chain[0].output_size == (camera.height, camera.width) for camera in cameras)


def _out_of_bounds(contract: PolicyContract, table: np.ndarray) -> list[Fault]:
    """Delta actions in the table `[n_bins, D]` that the contract's bounds forbid."""
    found = []
    for key, part in contract.action.bounded:
        bound, largest = getattr(contract.action, key), float(np.abs(table[:, part]).max(initial=0.0))
        if largest > bound * (1 + 1e-6):
            remedy = "Compute the statistics from actions within the bounds, or raise the bound of the contract."
            found.append(Fault("ACTION_BOUND", f"action.{key}", f"at most {bound:g}", f"{largest:g}", remedy))
    return found
