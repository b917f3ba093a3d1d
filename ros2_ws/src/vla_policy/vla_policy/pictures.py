"""Images as they are recorded: a serialised Image becomes a serialised CompressedImage.

The bytes are read where they lie: at 60 images a second, messages that Python builds and takes apart would cost more
than their compression.
"""

import io
import struct
from typing import Literal

from PIL import Image as Pictures

from vla.errors import Fault
from vla_policy.messages import MessageError

LITTLE_ENDIAN = b"\x00\x01"  # as every machine that ROS 2 is built for sends
STAMPED = 12  # bytes: how it is encoded, and the stamp
LOSSLESS_PIXELS = 256 * 256  # up to which `auto` takes PNG
QUALITY = 90
MODES = {"rgb8": ("RGB", "RGB", 3), "bgr8": ("RGB", "BGR", 3), "mono8": ("L", "L", 1)}
ImageFormat = Literal["auto", "png", "jpeg"]


def compressed(image: bytes, wanted: ImageFormat = "auto") -> bytes:
    """A CompressedImage for an Image, both in CDR. Raises MessageError for what isn't an image of 8 bits.

    wanted: png keeps every pixel; auto is png for small images, such as a policy's, and jpeg for others.
    """
    if image[:2] != LITTLE_ENDIAN:
        raise _refused("little-endian CDR", repr(image[:4]))
    try:
        _, at = _text(image, STAMPED)
        after_header = _aligned(at)
        height, width = struct.unpack_from("<II", image, after_header)
        encoding, at = _text(image, after_header + 8)
        at = _aligned(at + 1)  # past is_bigendian
        step, size = struct.unpack_from("<II", image, at)
    except (struct.error, UnicodeDecodeError) as error:
        raise _refused("an Image", f"{len(image)} bytes: {error}") from error
    pixels = memoryview(image)[at + 8 : at + 8 + size]
    if encoding not in MODES:
        raise _refused(f"one of {', '.join(MODES)}", encoding)
    mode, order, channels = MODES[encoding]
    if not height or not width or step < width * channels or len(pixels) < height * step:
        raise _refused("height x step bytes", f"{len(pixels)} for {height} x {width}, step {step}")
    kind = wanted if wanted != "auto" else "png" if height * width <= LOSSLESS_PIXELS else "jpeg"
    file = io.BytesIO()
    picture = Pictures.frombuffer(mode, (width, height), pixels, "raw", order, step, 1)
    picture.save(file, kind, **({"compress_level": 1} if kind == "png" else {"quality": QUALITY}))
    # By image_transport's convention: what it was, and what its decoder makes of the file. The file is a usual one.
    said = f"{encoding}; {kind} compressed" + (" bgr8" if channels == 3 else "")
    text = said.encode() + b"\0"
    text += bytes(-len(text) % 4)
    head = image[:after_header] + struct.pack("<I", len(said) + 1) + text
    return head + struct.pack("<I", file.tell()) + file.getvalue()


def _text(data: bytes, at: int) -> tuple[str, int]:
    """The string at an offset, and where it ends."""
    (size,) = struct.unpack_from("<I", data, at)
    end = at + 4 + size
    if not size or end > len(data):
        raise struct.error("a string that reaches beyond the message")
    return data[at + 4 : end - 1].decode(), end


def _aligned(at: int) -> int:
    return at + -at % 4


def _refused(expected: str, found: str) -> MessageError:
    remedy = "Publish uint8 images: rgb8, bgr8 or mono8."
    return MessageError(Fault("IMAGE_ENCODING", "recorded image", expected, found, remedy))
