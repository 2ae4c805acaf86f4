"""Random numbers with an explicit generator, reproducible over any number of processes.

All noise of the package is drawn through :func:`randn` and :func:`rand`. With a
:class:`ShardedGenerator` every process draws the noise of the *global* batch and keeps its own
rows, so that N processes holding B/N images each see exactly the noise of one process holding B
images. With :class:`RowGenerators` every image has a generator of its own, so that what is drawn
for an image does not depend on the batch that it is in.

>>> from vae.random import RowGenerators, ShardedGenerator, randn
>>> whole = randn((4, 2), torch.Generator().manual_seed(0), device="cpu")
>>> second = ShardedGenerator(torch.Generator().manual_seed(0), rank=1, world_size=2)
>>> torch.equal(randn((2, 2), second, device="cpu"), whole[2:])
True
>>> batch, alone = (
...     randn((len(rows), 2), RowGenerators.of(0, rows), device="cpu") for rows in ([3, 8], [8])
... )
>>> torch.equal(batch[1], alone[0])
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rng", "RowGenerators", "ShardedGenerator", "rand", "randn"]


@dataclass(frozen=True)
class ShardedGenerator:
    """One generator, in the same state on all processes, of which each process takes its rows.

    Args:
        generator: Seeded alike on every process.
        rank: Index of this process, in [0, world_size).
        world_size: Number of processes; each holds the same number of rows.

    Raises:
        ValueError: If the rank is outside [0, world_size).
    """

    generator: torch.Generator
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {self.rank}")


@dataclass(frozen=True)
class RowGenerators:
    """One generator for each row of the batch.

    Args:
        generators: On the same device, one a row.
        rows: Index of each row's image.
        common: For what all images share: in the same state whichever images are in the batch.
    """

    generators: tuple[torch.Generator, ...]
    rows: tuple[int, ...]
    common: torch.Generator

    @classmethod
    def of(cls, seed: int, rows: Sequence[int]) -> RowGenerators:
        """The generators of the images with these indices, on the CPU; ``seed`` is not negative.

        The generator tells 2^32 seeds apart: consecutive ones never coincide within a run.
        """
        first, common = map(int, np.random.SeedSequence(seed).generate_state(2, np.uint32))
        return cls(
            tuple(torch.Generator().manual_seed((first + row) % 2**32) for row in rows),
            tuple(rows),
            torch.Generator().manual_seed(common),
        )


Rng: TypeAlias = torch.Generator | ShardedGenerator | RowGenerators | None


def randn(
    shape: Sequence[int],
    rng: Rng,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise of `shape` (batch first) on `device`."""
    return _draw(torch.randn, shape, rng, device, dtype)


def rand(
    shape: Sequence[int],
    rng: Rng,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw uniform noise in [0, 1) of `shape` (batch first) on `device`."""
    return _draw(torch.rand, shape, rng, device, dtype)


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    rng: Rng,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    if isinstance(rng, ShardedGenerator):
        size = tuple(shape)
        if not size:
            raise ValueError("a sharded generator needs a batch axis")
        rows = size[0]
        full = (rows * rng.world_size, *size[1:])
        noise = draw(full, generator=rng.generator, device=rng.generator.device, dtype=dtype)
        return noise[rng.rank * rows : (rng.rank + 1) * rows].to(device)
    if isinstance(rng, RowGenerators):
        if shape[0] != len(rng.generators):
            raise ValueError(f"{len(rng.generators)} generators for {shape[0]} rows")
        drawn = [draw(tuple(shape[1:]), generator=g, dtype=dtype) for g in rng.generators]
        return torch.stack(drawn).to(device)
    if rng is None:
        return draw(tuple(shape), device=device, dtype=dtype)
    # The generator's device decides where the numbers are made, so that one seed means the same
    # noise on every device.
    return draw(tuple(shape), generator=rng, device=rng.device, dtype=dtype).to(device)
