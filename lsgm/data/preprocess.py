"""From images in [0, 1] to what the VAE sees in [-1, 1]: augmented, binarised or cut to b bits.

Everything acts on a batch (B, C, R, R) and draws its noise through :mod:`vae.random`, in the order
in which the functions are called, so that a seed fixes a training step on any number of processes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from lsgm.data.arrays import ArrayDataset
from lsgm.data.spec import DataSpec, ImageDataset
from vae.random import Rng, rand

__all__ = [
    "binarise",
    "fixed_binarisation",
    "preprocess",
    "random_affine",
    "random_flip",
    "reduce_bits",
]

# Largest magnitude of each random affine map: enough to make a stroke new, not enough to change
# what it depicts.
MAX_ROTATION = math.radians(10.0)
MAX_SHIFT = 0.08  # of the image side
MAX_LOG_SCALE = 0.1
MAX_SHEAR = 0.1


def preprocess(
    images: Tensor, spec: DataSpec, num_bits: int = 8, rng: Rng = None, *, train: bool = False
) -> Tensor:
    """Map images to the model's input.

    Args:
        images: Shape (B, C, R, R), in [0, 1].
        spec: The dataset's facts: whether it is binary, and its augmentation.
        num_bits: Bits per value that the model sees (binary data: 8).
        rng: Where the Bernoulli draws and the augmentation come from.
        train: Whether to augment.

    Returns:
        Shape (B, C, R, R), in [-1, 1]; binary data take only these two values.

    Raises:
        ValueError: If `num_bits` is outside 1..8, or not 8 for binary data.
    """
    if not 1 <= num_bits <= 8 or (spec.binary and num_bits != 8):
        raise ValueError(
            f"num_bits must be {'8 for binary data' if spec.binary else '1 to 8'}, not {num_bits}"
        )
    if train and spec.affine:
        images = random_affine(images, spec.padding, rng, spec.affine_padding)
    if train and spec.flip:
        images = random_flip(images, rng)
    images = binarise(images, rng) if spec.binary else reduce_bits(images, num_bits)
    return 2.0 * images - 1.0


def binarise(images: Tensor, rng: Rng) -> Tensor:
    """Draw one Bernoulli per pixel with the grey value as probability; 0 and 1 stay as they are."""
    return (rand(images.shape, rng, device=images.device) < images).to(images.dtype)


def reduce_bits(images: Tensor, num_bits: int) -> Tensor:
    """Keep the b = `num_bits` leading bits of 8-bit images: floor(255 x / 2^(8-b)) / (2^b - 1).

    Exact in float32 for every x = k/255.
    """
    if num_bits == 8:
        return images
    return torch.floor(images * 255.0 / 2 ** (8 - num_bits)) / (2**num_bits - 1)


def random_flip(images: Tensor, rng: Rng) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = rand((len(images), 1, 1, 1), rng, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def random_affine(images: Tensor, padding: int, rng: Rng, outside: str = "zeros") -> Tensor:
    """Shift, rotate, scale and shear each image a little (bilinear).

    From outside come zeros, or the image itself, mirrored at its border (``outside`` "zeros" or
    "reflection"). The map acts on the image without its padding, so that nothing moves into the
    border that the likelihood ignores.
    """
    inner = images[..., padding : images.shape[-2] - padding, padding : images.shape[-1] - padding]
    # (B, 6) in [-1, 1): rotation, scale, two shears, two shifts.
    u = 2.0 * rand((len(images), 6), rng, device=images.device, dtype=images.dtype) - 1.0
    angle, scale = MAX_ROTATION * u[:, 0], torch.exp(MAX_LOG_SCALE * u[:, 1])
    cos, sin = torch.cos(angle), torch.sin(angle)
    shear_x, shear_y = MAX_SHEAR * u[:, 2], MAX_SHEAR * u[:, 3]
    # Rotation times shear, scaled; the grid spans [-1, 1], hence the factor 2 of a shift in units
    # of the side.
    rows = [
        torch.stack(
            [scale * (cos - sin * shear_y), scale * (cos * shear_x - sin), 2 * MAX_SHIFT * u[:, 4]],
            dim=1,
        ),
        torch.stack(
            [scale * (sin + cos * shear_y), scale * (sin * shear_x + cos), 2 * MAX_SHIFT * u[:, 5]],
            dim=1,
        ),
    ]
    theta = torch.stack(rows, dim=1)
    grid = affine_grid(theta, list(inner.shape), align_corners=False)
    moved = grid_sample(inner, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return pad(moved.clamp(0.0, 1.0), (padding,) * 4)


def fixed_binarisation(dataset: ImageDataset, seed: int) -> ArrayDataset:
    """Binarise every image once, with its own fixed draw.

    The draw of image i depends on the seed and on i alone, not on batch size, device or number of
    processes, so a likelihood on the result is a number about fixed data.

    Args:
        dataset: Grey images in [0, 1].
        seed: Seed of the draws.

    Returns:
        A dataset of the same length and padding, with values 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        (binarise(dataset.batch(index), generator) * 255.0).to(torch.uint8)
        for index in torch.arange(len(dataset)).split(1000)
    ]
    return ArrayDataset(torch.cat(blocks), dataset.labels)
