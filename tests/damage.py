"""Damaged copies of a file's content."""

from __future__ import annotations

import random
from collections.abc import Iterator


def flips(content: bytes, count: int = 200, seed: int = 0) -> Iterator[bytes]:
    """Copies with one bit changed, in seeded random places."""
    rng = random.Random(seed)
    for _ in range(count):
        place = rng.randrange(8 * len(content))
        copy = bytearray(content)
        copy[place // 8] ^= 1 << place % 8
        yield bytes(copy)


def truncations(content: bytes, count: int = 200, seed: int = 0) -> Iterator[bytes]:
    """Copies that end early: nothing, all but a byte, and seeded random lengths between."""
    rng = random.Random(seed)
    lengths = [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(count - 2))]
    for length in lengths:
        yield content[:length]


def damages(content: bytes) -> Iterator[bytes]:
    """200 flips and 200 truncations."""
    yield from flips(content)
    yield from truncations(content)
