"""A folder of images of any size, grey or colour, with or without class subfolders."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lsgm.config.training import DataConfig
from lsgm.data.discovery import count_files, find_images, subfolders
from lsgm.data.images import EXTENSIONS, is_grey, read_image
from lsgm.data.packed import crop_note, is_packed, load_packed, pictures_spec
from lsgm.data.packing.engine import pack
from lsgm.data.packing.settings import PackSettings
from lsgm.data.packing.splits import held_out
from lsgm.data.readers.base import Label, Source
from lsgm.data.readers.folders import FilePictures, fingerprint_of
from lsgm.data.spec import Datasets, ImageDataset
from lsgm.errors import UserError
from lsgm.system.locks import InUseError, make_folder
from lsgm.system.progress import progress_bar

__all__ = ["Folder", "FolderDataset"]

# Names of the splits, in any case; where several are there, the first here.
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
WAIT_SECONDS = 0.5
READING_THREADS = 8
"""Threads that read all images at the start of a training, at most."""


Named = list[tuple[Path, str | None]]
"""Image files, each with the name of its class."""


@dataclass(frozen=True)
class Folder:
    """Build train and test sets from a folder: one that ``lsgm prepare`` has packed, or pictures,
    which are packed into a cache on first use where the disk has room.

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
        root = Path(cfg.root).expanduser()
        if not root.is_dir():
            raise UserError(f"data.root: {root} is not a folder")
        if is_packed(root):
            return load_packed(root, cfg)
        if cfg.image_size is None:
            raise UserError(
                "data.image_size: data.name folder needs the side in pixels, for example 64"
            )
        train, test, ignored = _splits(root, cfg.test_fraction)
        paths = [path for path, _ in train + test]
        channels = cfg.channels or (1 if all(map(is_grey, paths)) else 3)
        cached = _packed(root, cfg, channels, {"train": train, "test": test})
        if cached is not None:
            return load_packed(cached, cfg, ignored)
        names = {name for _, name in train + test}
        classes = None if None in names or len(names) < 2 else sorted(filter(None, names))
        size = (cfg.image_size, cfg.image_width or cfg.image_size)
        spec = pictures_spec(cfg, channels, size, len(classes) if classes else None)
        sets = [
            FolderDataset(
                [path for path, _ in split],
                size=size,
                channels=channels,
                labels=torch.tensor([classes.index(name) for _, name in split if name])
                if classes
                else None,
                num_workers=cfg.num_workers,
            )
            for split in (train, test)
        ]
        return Datasets(sets[0], sets[1], spec, dict(ignored))


def _packed(root: Path, cfg: DataConfig, channels: int, splits: Mapping[str, Named]) -> Path | None:
    """The folder of the cache that has these pictures packed; None if there is no room for them.

    Raises:
        UserError: A picture cannot be read.
    """
    assert cfg.image_size is not None
    width = cfg.image_width or cfg.image_size
    if cfg.cache == "off":
        return None
    pictures = {
        split: FilePictures(root, [p for p, _ in named], _labels(named))
        for split, named in splits.items()
    }
    settings = PackSettings(
        cfg.image_size, cfg.image_width, channels, test_fraction=cfg.test_fraction, max_broken=0
    )
    print_of = fingerprint_of(pictures)
    kind = hashlib.sha256(f"{root.resolve()} {settings}".encode()).hexdigest()[:16]
    cache = cache_folder()
    folder = cache / f"{kind}-{print_of[:16]}"
    if is_packed(folder):
        return folder
    bytes_needed = sum(map(len, pictures.values())) * channels * cfg.image_size * width
    try:
        make_folder(folder)
        if bytes_needed > shutil.disk_usage(folder).free // 2:
            folder.rmdir()
            raise OSError
    except (OSError, UserError):
        print(f"data: no room in {cache} for {bytes_needed / 1e9:.1f} GB; decoding in each epoch")
        return None
    source = Source(root, "folder", pictures, print_of)
    while True:
        try:
            how = "as data.name folder makes them"
            index = pack(source, pictures, folder, settings, how=how)
            break
        except InUseError:  # another process packs the same: wait for it, or for its end
            time.sleep(WAIT_SECONDS)
            if is_packed(folder):
                return folder
    if (note := crop_note(index)) is not None:
        print(note)
    print(f"data: {root} is packed in {folder} ({bytes_needed / 1e6:.0f} MB; data.cache off: no)")
    for old in cache.glob(f"{kind}-*"):  # of the same folder as it was, finished or not
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _labels(named: Named) -> list[Label] | None:
    labels: list[Label] = [name for _, name in named]
    return None if None in labels else labels


def cache_folder() -> Path:
    """Where folders of pictures are packed: below the environment variable LSGM_CACHE, or
    ``~/.cache/lsgm``.
    """
    return Path(os.environ.get("LSGM_CACHE") or "~/.cache/lsgm").expanduser() / "packed"


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
    parts = held_out(len(images), round(test_fraction * len(images)))
    return [images[i] for i in parts[0]], [images[i] for i in parts[1]], ignored


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
    """Images that are decoded, resized (shorter side) and cropped (centre) when they are needed.

    Args:
        paths: Image files.
        size: Height and width in pixels.
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
        size: tuple[int, int],
        channels: int,
        labels: Tensor | None,
        num_workers: int,
    ) -> None:
        self.paths = paths
        self.size = size
        self.channels = channels
        self.labels = labels
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, index: Tensor) -> Tensor:
        """Return the images at `index`; raises UserError naming a file that cannot be read."""
        run = self._pool.map if self._pool else map
        return torch.stack(list(run(self._decode, index.tolist()))).float() / 255.0

    def read_all(self) -> None:
        """Decode every image once, in threads."""
        threads = min(READING_THREADS, os.cpu_count() or 1)
        damaged = []
        bar = progress_bar(total=len(self), desc="reading images", unit="img", leave=False)
        with bar, ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(self), 1000):  # a bound on waiting jobs
                items = range(start, min(start + 1000, len(self)))
                for error in pool.map(self._try, items):
                    if error is not None:
                        damaged.append(error)
                    bar.update()
        if len(damaged) == 1:
            raise UserError(damaged[0])
        if damaged:
            raise UserError(f"{damaged[0]}; and {len(damaged) - 1} more of {len(self)} files")

    def _try(self, item: int) -> str | None:
        """Decode an image; what is wrong with it, if anything."""
        try:
            self._decode(item)
        except UserError as error:
            return str(error)
        return None

    def _decode(self, item: int) -> Tensor:
        return read_image(self.paths[item], self.size, self.channels)
