"""A folder of images of any size, grey or colour, with or without class subfolders."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsgm.config.training import DataConfig
from lsgm.data.discovery import count_files, find_images, subfolders
from lsgm.data.images import EXTENSIONS, is_grey, read_image
from lsgm.data.spec import Datasets, DataSpec, ImageDataset
from lsgm.errors import UserError
from lsgm.system.progress import progress_bar

__all__ = ["Folder", "FolderDataset"]

# A set below this size is decoded once and kept as uint8.
MEMORY_LIMIT_BYTES = 2 * 1024**3
# Names of the splits, in any case; where several are there, the first here.
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
READING_THREADS = 8
"""Threads that read all images at the start of a training, at most."""


@dataclass(frozen=True)
class Folder:
    """Build train and test sets from a folder.

    * ``root/train`` and ``root/test`` (or val; in any case) are the splits where both exist;
      otherwise `test_fraction` of all images, chosen by a fixed seed over the sorted file names, is
      the test set.
    * Images that lie in subfolders of a split get the subfolder's name as label, unless some image
      lies beside them or there is one subfolder only.
    * Images are grey if all files are.
    """

    def __call__(self, cfg: DataConfig) -> Datasets:
        if cfg.root is None:
            raise UserError("data.root: data.name folder needs the folder of images")
        if cfg.image_size is None:
            raise UserError(
                "data.image_size: data.name folder needs the side in pixels, for example 64"
            )
        root = Path(cfg.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data.root: {root} is not a folder")
        train, test, ignored = _splits(root, cfg.test_fraction)
        paths = [path for path, _ in train + test]
        channels = cfg.channels or (1 if all(map(is_grey, paths)) else 3)
        names = {name for _, name in train + test}
        classes = None if None in names or len(names) < 2 else sorted(filter(None, names))
        spec = DataSpec(
            name=cfg.name,
            channels=channels,
            image_size=cfg.image_size,
            padding=0,
            binary=False,
            num_classes=len(classes) if classes else None,
            flip=True if cfg.flip is None else cfg.flip,
            affine=cfg.augment == "affine",
            affine_padding="reflection",
        )
        sets = [
            FolderDataset(
                [path for path, _ in split],
                image_size=cfg.image_size,
                channels=channels,
                labels=torch.tensor([classes.index(name) for _, name in split if name])
                if classes
                else None,
                num_workers=cfg.num_workers,
            )
            for split in (train, test)
        ]
        return Datasets(sets[0], sets[1], spec, dict(ignored))


Named = list[tuple[Path, str | None]]
"""Image files, each with the name of its class."""


def _splits(root: Path, test_fraction: float) -> tuple[Named, Named, Counter[str]]:
    """The images of both splits, and why other files are ignored.

    Raises:
        UserError: There are no images, too few, or it cannot be told what is a split.
    """
    folders = subfolders(root)
    train, test = (_split_folder(folders, names) for names in (TRAIN_FOLDERS, TEST_FOLDERS))
    ignored: Counter[str] = Counter()
    if train is not None and test is not None:
        outside = (path for path in root.iterdir() if path not in (train, test))
        ignored[f"outside {train.name}/ and {test.name}/"] += sum(map(count_files, outside))
        return _named_images(train, ignored), _named_images(test, ignored), ignored
    if train is None and test is not None:
        raise UserError(f"data.root: {root} has {test.name}/ and no train/ beside it")
    images = _named_images(root, ignored)
    if train is not None:
        beside = next((path for path, _ in images if train not in path.parents), None)
        if beside is not None:
            raise UserError(
                f"data.root: {root} has {train.name}/ and no test/, but other images beside it "
                f"({beside.relative_to(root)}): add test/, choose {train}, or rename {train.name}/ "
                "if it is a class"
            )
        images = _with_classes([path for path, _ in images], train)
    if len(images) < 2:
        raise UserError(
            f"data.root: {root} has one image only; training and testing need at least two"
        )
    order = np.random.default_rng(0).permutation(len(images))
    held_out = min(max(round(test_fraction * len(images)), 1), len(images) - 1)
    parts = ([images[i] for i in sorted(p)] for p in (order[held_out:], order[:held_out]))
    return next(parts), next(parts), ignored


def _split_folder(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    for name in names:
        matches = [folder for folder in folders if folder.name.lower() == name]
        if len(matches) > 1:
            both = " and ".join(f"{folder.name}/" for folder in matches)
            raise UserError(f"data.root: {matches[0].parent} has {both}; keep one of them")
        if matches:
            return matches[0]
    return None


def _named_images(folder: Path, ignored: Counter[str]) -> Named:
    """All images below ``folder`` with their classes; adds up what is ignored."""
    found = find_images(folder)
    ignored.update(found.ignored)
    if not found.files:
        raise UserError(f"data.root: no image in {folder} (accepted: {' '.join(EXTENSIONS)})")
    return _with_classes(found.files, folder)


def _with_classes(paths: list[Path], folder: Path) -> Named:
    """The first-level subfolder of each image below ``folder`` as its class, or None for all."""
    parts = [path.relative_to(folder).parts for path in paths]
    labelled = all(len(names) > 1 for names in parts)
    return [
        (path, names[0] if labelled else None) for path, names in zip(paths, parts, strict=True)
    ]


class FolderDataset(ImageDataset):
    """Images that are decoded, resized (shorter side) and cropped (centre) when first needed.

    Args:
        paths: Image files.
        image_size: Side in pixels.
        channels: 1 or 3.
        labels: Shape (N,), int64, or None.
        num_workers: Threads that decode; decoding and resizing run outside Python's interpreter
            lock.
    """

    gather_ahead = True

    def __init__(
        self,
        paths: list[Path],
        *,
        image_size: int,
        channels: int,
        labels: Tensor | None,
        num_workers: int,
    ) -> None:
        self.paths = paths
        self.image_size = image_size
        self.channels = channels
        self.labels = labels
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        shape = (len(paths), channels, image_size, image_size)
        in_memory = int(np.prod(shape)) <= MEMORY_LIMIT_BYTES
        self._cache = torch.zeros(shape, dtype=torch.uint8) if in_memory else None
        self._cached = np.zeros(len(paths), dtype=bool)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, index: Tensor) -> Tensor:
        """Return the images at `index`; raises UserError naming a file that cannot be read."""
        items = index.tolist()
        missing = [i for i in items if not self._cached[i]]
        decoded = dict(
            zip(
                missing, (self._pool.map if self._pool else map)(self._decode, missing), strict=True
            )
        )
        if self._cache is None:
            images = torch.stack([decoded[i] for i in items])
        else:
            for i, image in decoded.items():
                self._cache[i] = image
                self._cached[i] = True
            images = self._cache[index]
        return images.float() / 255.0

    def read_all(self) -> None:
        """Decode every image once, in threads; what fits in memory is kept."""
        threads = min(READING_THREADS, os.cpu_count() or 1)
        damaged = []
        items = np.flatnonzero(~self._cached).tolist()
        bar = progress_bar(total=len(items), desc="reading images", unit="img", leave=False)
        with bar, ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(items), 1000):  # a bound on waiting jobs
                for error in pool.map(self._try, items[start : start + 1000]):
                    if error is not None:
                        damaged.append(error)
                    bar.update()
        if len(damaged) == 1:
            raise UserError(damaged[0])
        if damaged:
            raise UserError(f"{damaged[0]}; and {len(damaged) - 1} more of {len(self)} files")

    def _try(self, item: int) -> str | None:
        """Read an image, and keep it if all fit in memory; what is wrong with it, if anything."""
        try:
            image = self._decode(item)
        except UserError as error:
            return str(error)
        if self._cache is not None:
            self._cache[item] = image
            self._cached[item] = True
        return None

    def _decode(self, item: int) -> Tensor:
        return read_image(self.paths[item], self.image_size, self.channels)
