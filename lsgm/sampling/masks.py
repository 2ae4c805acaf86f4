"""Which pixels of an image are known: by name, or as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from lsgm.data.images import load_image, read_image
from lsgm.errors import UserError

__all__ = [
    "MASKS",
    "make_mask",
    "state_mask",
]

MASKS = ("centre", "left", "right", "top", "bottom", "random")


def make_mask(name: str, height: int, width: int, seed: int = 0) -> Tensor:
    """Which pixels are known: bool ``(height, width)``. ``name`` is the unknown part, or a file.

    Raises:
        UserError: There is no such mask or file, or the file has another size or hides no pixel.
    """
    known = torch.ones(height, width, dtype=torch.bool)
    parts = {
        "centre": tuple(slice(side // 4, side - side // 4) for side in (height, width)),
        "left": (slice(None), slice(None, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "top": (slice(None, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
    }
    if name in parts:
        known[parts[name]] = False
        return known
    if name == "random":
        return torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    if not Path(name).is_file():
        raise UserError(f"--mask: {name} is neither a file nor one of {', '.join(MASKS)}")
    return _mask_of_file(Path(name), height, width)


def _mask_of_file(path: Path, height: int, width: int) -> Tensor:
    """A picture as a mask. Where it has transparent pixels, those are unknown and its colours mean
    nothing; in an opaque picture the dark pixels are.
    """
    try:
        image = load_image(path)
    except UserError as error:
        raise UserError(f"--mask: {error}") from error
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    if image.size != (width, height):
        raise UserError(
            f"--mask: {path} is {image.width} x {image.height} pixels, the images are "
            f"{width} x {height}: give a mask of their size"
        )
    opaque = torch.from_numpy(alpha) >= 128
    known = read_image(path, (height, width), 1)[0] >= 128 if opaque.all() else opaque
    if known.all():
        raise UserError(f"--mask: {path} hides no pixel: make those to draw dark or transparent")
    return known


def state_mask(known: Tensor, padding: int, shape: Sequence[int]) -> Tensor:
    """The entries of a state ``(..., h, w)`` of this shape all of whose pixels are known: bool
    ``(h, w)``.

    ``known (H, W)``; the ``padding`` around the image that the network sees is known.
    """
    height, width = shape[-2:]
    if (height, width) == known.shape:
        return known
    unknown = pad((~known).float(), (padding,) * 4)
    block = (unknown.shape[0] // height, unknown.shape[1] // width)
    return max_pool2d(unknown[None], block)[0] == 0
