"""Which pixels of an image are known: by name, or as a picture."""

from __future__ import annotations

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


def make_mask(name: str, size: int, seed: int = 0) -> Tensor:
    """Which pixels are known: bool ``(size, size)``. ``name`` is the unknown part, or a file.

    Raises:
        UserError: There is no such mask or file, or the file has another size or hides no pixel.
    """
    known = torch.ones(size, size, dtype=torch.bool)
    half, quarter = size // 2, size // 4
    parts = {
        "centre": (slice(quarter, size - quarter), slice(quarter, size - quarter)),
        "left": (slice(None), slice(None, half)),
        "right": (slice(None), slice(half, None)),
        "top": (slice(None, half), slice(None)),
        "bottom": (slice(half, None), slice(None)),
    }
    if name in parts:
        known[parts[name]] = False
        return known
    if name == "random":
        return torch.rand(size, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    if not Path(name).is_file():
        raise UserError(f"--mask: {name} is neither a file nor one of {', '.join(MASKS)}")
    return _mask_of_file(Path(name), size)


def _mask_of_file(path: Path, size: int) -> Tensor:
    """A picture as a mask. Where it has transparent pixels, those are unknown and its colours mean
    nothing; in an opaque picture the dark pixels are.
    """
    try:
        image = load_image(path)
    except UserError as error:
        raise UserError(f"--mask: {error}") from error
    alpha = np.array(image.convert("RGBA").getchannel("A"))
    if image.size != (size, size):
        raise UserError(
            f"--mask: {path} is {image.width} x {image.height} pixels, the images are "
            f"{size} x {size}: give a mask of their size"
        )
    opaque = torch.from_numpy(alpha) >= 128
    known = read_image(path, size, 1)[0] >= 128 if opaque.all() else opaque
    if known.all():
        raise UserError(f"--mask: {path} hides no pixel: make those to draw dark or transparent")
    return known


def state_mask(known: Tensor, padding: int, size: int) -> Tensor:
    """The entries of a state of side ``size`` all of whose pixels are known: bool ``(size, size)``.

    ``known (H, W)``; the ``padding`` around the image that the network sees is known.
    """
    if size == known.shape[-1]:
        return known
    unknown = pad((~known).float(), (padding,) * 4)
    return max_pool2d(unknown[None], unknown.shape[-1] // size)[0] == 0
