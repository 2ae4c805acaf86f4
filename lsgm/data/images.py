"""Reading one picture, from a file, from the bytes of one or from an array: the only place of the
package that opens one.

A file is opened as one of :data:`FORMATS` or not at all, whatever its name says: other formats of
Pillow start programs (EPS: Ghostscript) or are rarely tested. Its size is bounded before it is
decoded. What becomes of each kind of picture:

===========================  =====================================================================
kind                         treatment
===========================  =====================================================================
8 bits, grey or colour       kept; grey from colour is ITU-R 601 luma
1 bit                        0 and 255
palette                      its colours
alpha, a transparent colour  composited over white (:data:`BACKGROUND`)
CMYK, YCbCr                  converted to RGB by Pillow; Lab is refused
16 bits, grey                scaled by 65535 (a 12-bit TIFF: by 4095) and rounded
floating point               scaled by 255 and rounded; refused unless all are numbers in [0, 1]
32-bit integers              refused: nothing says which value is white
EXIF orientation             applied
several frames or pages      the first
ICC profile                  ignored
===========================  =====================================================================
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lsgm.errors import UserError, one_line

__all__ = [
    "BACKGROUND",
    "Box",
    "EXTENSIONS",
    "FORMATS",
    "MAX_PIXELS",
    "Stored",
    "is_grey",
    "load_image",
    "read_image",
    "read_pixels",
    "to_8_bits",
]

Stored: TypeAlias = "Path | bytes | np.ndarray"
"""A picture as it is kept: a file, the bytes of one, or an array ``(H, W)`` or ``(H, W, C)`` of
8-bit values with 1, 3 or 4 channels, the fourth being alpha."""

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the right and bottom ones left out."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".j2k")
BACKGROUND = 255
"""What shows through transparent pixels: white."""
MAX_PIXELS = 2**26
"""Pixels of the largest picture that is decoded: 8192 x 8192, about 500 MB."""
LARGE_PIXELS = 2**24
"""Pictures above this size are decoded one at a time, however many threads read."""

_large = threading.Lock()
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
# The bound here is lower than that of Pillow's warning, and an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_pixels(
    stored: Stored,
    size: int | tuple[int, int],
    channels: int,
    *,
    name: str | None = None,
    box: Box | None = None,
    crop: int | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    size_of: list[int] | None = None,
) -> np.ndarray:
    """Return a picture as uint8 with shape (H, W, channels): resized until it covers H x W, centre
    cropped.

    Args:
        stored: The picture.
        size: Height and width in pixels, or the side of a square.
        channels: 1 or 3.
        name: What a message calls it; needed for all but files.
        box: Part of the upright picture that is taken first.
        crop: Side of the centre square that is taken first.
        resample: How it is resized, always antialiased.
        size_of: Gets height and width of the upright picture.

    Raises:
        UserError: The picture cannot be read, is none, too large, has pixels whose scale is
            unknown, or is smaller than ``box`` or ``crop``.
    """
    label = _label(stored, name)
    height, width = (size, size) if isinstance(size, int) else size
    with _opened(stored, label) as image, _room_for(image):
        image = to_8_bits(_decoded(image), label, channels)
        if size_of is not None:
            size_of += [image.height, image.width]
        if crop is not None:
            left, top = (image.width - crop) // 2, (image.height - crop) // 2
            box = (left, top, left + crop, top + crop)
        if box is not None:
            if min(box) < 0 or box[2] > image.width or box[3] > image.height:
                raise UserError(
                    f"{label}: {image.width} x {image.height} pixels are too few for a crop of "
                    f"{box[2] - box[0]} x {box[3] - box[1]} at ({box[0]}, {box[1]})"
                )
            image = image.crop(box)
        image = ImageOps.fit(image, (width, height), method=resample)
    return np.array(image, dtype=np.uint8).reshape(height, width, channels)


def read_image(
    stored: Stored, size: int | tuple[int, int], channels: int, **options: Any
) -> Tensor:
    """:func:`read_pixels` as a tensor of shape (channels, H, W), uint8."""
    pixels = torch.from_numpy(read_pixels(stored, size, channels, **options))
    return pixels.permute(2, 0, 1).contiguous()


def load_image(stored: Stored, name: str | None = None) -> Image.Image:
    """Return the first frame of a picture, upright, in its own mode, alpha included.

    Raises:
        UserError: As :func:`read_pixels`.
    """
    with _opened(stored, _label(stored, name)) as image, _room_for(image):
        return _decoded(image).copy()


def is_grey(stored: Stored, name: str | None = None) -> bool:
    """Whether a picture holds grey values only, by its header (a palette is colour).

    Raises:
        UserError: As :func:`read_pixels`.
    """
    with _opened(stored, _label(stored, name)) as image:
        return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def to_8_bits(image: Image.Image, path: str | Path, channels: int) -> Image.Image:
    """Return a decoded picture in mode L (``channels`` 1) or RGB (3), treated as the module says.

    ``path`` is for the message alone.

    Raises:
        UserError: Its pixels have no known scale.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image, path)
    if image.has_transparency_data:
        colours = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, (BACKGROUND,) * 3)
        image.paste(colours, mask=colours)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _scaled(image: Image.Image, path: str | Path) -> Image.Image:
    """Grey values of more than 8 bits in mode L."""
    if image.mode == "I" and image.format != "PNG":  # older Pillow reads 16-bit PNG files as I
        raise UserError(
            f"{path}: 32-bit integer pixels do not say which value is white; save the picture with "
            "8 or 16 bits"
        )
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    white: float = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    if image.mode == "F":
        white, low, high = 1.0, values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{path}: floating-point pixels have to be numbers in [0, 1], and these are "
                f"{low:g} to {high:g}; scale them, or save the picture with 8 or 16 bits"
            )
    inverted = tags.get(_PHOTOMETRIC) == 0  # white is zero; Pillow inverts 8-bit files only
    transparent = image.info.get("transparency")
    result = np.empty(values.shape, np.uint8)
    rows = max(1, LARGE_PIXELS // 16 // image.width)  # in blocks, for the memory's sake
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        grey = np.rint(block.astype(np.float32) * (255.0 / white)).clip(0, 255)
        grey = 255 - grey if inverted else grey
        result[start : start + rows] = grey
        if transparent is not None:
            result[start : start + rows][block == transparent] = BACKGROUND
    return Image.fromarray(result)


def _decoded(image: Image.Image) -> Image.Image:
    """The first frame, upright."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


@contextlib.contextmanager
def _room_for(image: Image.Image) -> Iterator[None]:
    with _large if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
        yield


def _label(stored: Stored, name: str | None) -> str:
    if name is None and not isinstance(stored, Path):
        raise ValueError("a picture that is no file needs a name")
    return str(stored) if name is None else name


def _open(stored: Stored, label: str) -> Image.Image:
    if not isinstance(stored, np.ndarray):
        source = io.BytesIO(stored) if isinstance(stored, bytes) else stored
        return Image.open(source, formats=FORMATS)
    shape = stored.shape
    plain = stored.ndim == 2 or (stored.ndim == 3 and shape[2] in (1, 3, 4))
    if stored.dtype != np.uint8 or not plain or min(shape) == 0:
        raise UserError(
            f"{label}: {stored.dtype} of shape {shape} is no picture; uint8 of shape (H, W), or "
            "(H, W, 1, 3 or 4), is needed"
        )
    return Image.fromarray(np.ascontiguousarray(stored[..., 0] if shape[2:] == (1,) else stored))


@contextlib.contextmanager
def _opened(stored: Stored, label: str) -> Iterator[Image.Image]:
    """A picture whose header has been read; every error of reading it in the block is one line."""
    try:
        with _open(stored, label) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(label, f"{image.width} x {image.height} pixels")
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(label, "more pixels than can be decoded") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{label}: not a readable image (none of {', '.join(FORMATS)}, or its header is "
            "damaged)"
        ) from error
    except Exception as error:  # on damaged files Pillow raises whatever it stumbles over
        raise UserError(f"{label}: not a readable image ({one_line(error)})") from error


def _too_large(label: str, found: str) -> UserError:
    return UserError(f"{label}: too large ({found}; at most {MAX_PIXELS}, such as 8192 x 8192)")
