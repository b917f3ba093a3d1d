"""The protocol between `vla serve` and its clients: messages of msgpack over a WebSocket. No pickle, ever.

The server greets with {"protocol", "contract"}. A request is {"observations": [...]}, the answer {"chunks": [...]} or
{"error": {"code", "message", "remedy"}}. An array is {"dtype", "shape", "data"}, of numbers only.
"""

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from vla.errors import SimrealError
from vla.types import ActionChunk, Observation

PROTOCOL = 1
PORT = 8765
MAX_BYTES = 64 * 2**20  # of one message
DTYPES = ("uint8", "float32", "float64")


class WireError(SimrealError):
    """A message that is not of this protocol."""


def pack(message: Mapping[str, Any]) -> bytes:
    return bytes(msgpack.packb(message, default=_encode, use_bin_type=True))


def unpack(data: bytes | str) -> dict[str, Any]:
    """A message with its arrays. Raises WireError."""
    remedy = "Both sides need the same release of simreal."
    if isinstance(data, str):
        raise WireError("a text came where a msgpack message was expected", code="WIRE", remedy=remedy)
    try:
        message = msgpack.unpackb(data, object_hook=_decode, raw=False, strict_map_key=True)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"a message can't be read: {error}", code="WIRE", remedy=remedy) from error
    if not isinstance(message, dict):
        raise WireError("a message is not a map", code="WIRE", remedy=remedy)
    return message


def observation_data(seen: Observation) -> dict[str, Any]:
    return {
        "images": dict(seen.images), "state": dict(seen.state), "instruction": seen.instruction,
        "stamps": {name: float(stamp) for name, stamp in seen.stamps.items()},
    }  # fmt: skip


def observation_from(data: Any) -> Observation:
    """Raises WireError if a part is missing or of the wrong kind."""
    try:
        images = {str(k): _array(v) for k, v in data["images"].items()}
        state = {str(k): _array(v) for k, v in data["state"].items()}
        stamps = {str(k): float(v) for k, v in data["stamps"].items()}
        return Observation(images, state, str(data["instruction"]), stamps)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WireError(f"not an observation: {error!r}", code="WIRE", remedy="See deployment/wire.py.") from error


def chunk_data(chunk: ActionChunk) -> dict[str, Any]:
    return {"actions": chunk.actions, "stamp": float(chunk.stamp)}


def chunk_from(data: Any) -> ActionChunk:
    """Raises WireError if a part is missing or of the wrong kind."""
    try:
        return ActionChunk(_array(data["actions"]).astype(np.float64), float(data["stamp"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WireError(f"not an action chunk: {error!r}", code="WIRE", remedy="See deployment/wire.py.") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.name in DTYPES:
        return {"dtype": value.dtype.name, "shape": list(value.shape), "data": np.ascontiguousarray(value).tobytes()}
    raise TypeError(f"{type(value).__name__} can't be sent")


def _decode(value: dict[str, Any]) -> Any:
    if value.keys() != {"dtype", "shape", "data"}:
        return value
    if value["dtype"] not in DTYPES:
        raise ValueError(f"an array of {value['dtype']}")
    return np.frombuffer(value["data"], value["dtype"]).reshape(value["shape"])


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} in place of an array")
    return value
