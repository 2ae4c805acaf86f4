"""Which pictures are for training and which for testing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from lsgm.data.images import Stored
from lsgm.data.packing.settings import Preset
from lsgm.data.readers.base import ALL, Pictures, Source
from lsgm.errors import UserError

__all__ = ["Part", "choose_splits", "held_out"]

PARTITION = ("train", "validation", "test")


class Part(Pictures):
    """Some of the pictures of a split."""

    def __init__(self, pictures: Pictures, chosen: Sequence[int]) -> None:
        self.pictures, self.chosen = pictures, list(chosen)
        self.in_memory = pictures.in_memory
        self.names = [pictures.names[i] for i in self.chosen]
        labels = pictures.labels
        self.labels = None if labels is None else [labels[i] for i in self.chosen]

    def read(self, index: int) -> Stored:
        return self.pictures.read(self.chosen[index])


def held_out(count: int, number: int) -> tuple[list[int], list[int]]:
    """Numbers of the pictures to train on and of ``number`` held out, by a fixed seed; both in
    order, and neither empty.
    """
    number = min(max(number, 1), count - 1)
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[number:].tolist()), sorted(order[:number].tolist())


def choose_splits(
    source: Source, test_fraction: float, preset: Preset | None
) -> tuple[Mapping[str, Pictures], str]:
    """The splits to pack, and in words how they came about.

    Raises:
        UserError: There are too few pictures, or the file of the partition does not fit.
    """
    splits = dict(source.splits)
    if len(splits) > 1:
        return splits, f"splits as the source has them: {', '.join(splits)}"
    ((name, pictures),) = splits.items()
    if preset and preset.partition:
        by_file = _by_partition(source, pictures, preset.partition)
        if by_file:
            return by_file, f"splits by {preset.partition}"
    if len(pictures) < 2:
        raise UserError(f"{source.path}: one picture only; training and testing need at least two")
    number = round(test_fraction * len(pictures))
    if preset and preset.held_out and len(pictures) == sum(preset.counts.values()):
        number = preset.held_out
    train, test = held_out(len(pictures), number)
    had = "no split" if name == ALL else f"only {name}"
    return (
        {"train": Part(pictures, train), "test": Part(pictures, test)},
        f"the source has {had}: {len(test)} pictures are held out as the test set, by a fixed seed",
    )


def _by_partition(source: Source, pictures: Pictures, name: str) -> dict[str, Pictures] | None:
    places = [folder / name for folder in (source.path, source.path.parent)]
    places += [folder / "Eval" / name for folder in (source.path, source.path.parent)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    numbers = _partition(path)
    chosen: dict[str, list[int]] = {split: [] for split in PARTITION}
    for i, picture in enumerate(pictures.names):
        number = numbers.get(PurePosixPath(picture).stem)
        if number is None:
            raise UserError(f"{path}: has no line for {picture}")
        chosen[PARTITION[number]].append(i)
    return {split: Part(pictures, part) for split, part in chosen.items() if part}


def _partition(path: Path) -> dict[str, int]:
    """Split by the stem of the file name: the aligned pictures are .jpg or .png."""
    found = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = line.replace(",", " ").split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            if number == 1:  # a header, as the copies with commas have
                continue
            raise UserError(f"{path}: line {number} is not a file name and 0, 1 or 2")
        found[PurePosixPath(words[0]).stem] = int(words[1])
    return found
