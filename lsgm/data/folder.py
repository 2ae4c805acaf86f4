"""A folder of images of any size, grey or colour, with or without class subfolders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lsgm.config import DataConfig
from lsgm.data.spec import Datasets, DataSpec, ImageDataset
from lsgm.errors import UserError

__all__ = ["EXTENSIONS", "Folder", "FolderDataset", "read_image"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# A set below this size is decoded once and kept as uint8.
MEMORY_LIMIT_BYTES = 2 * 1024**3
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class Folder:
    """Build train and test sets from a folder.

    * ``root/train`` and ``root/test`` (or val) are the splits where both exist; otherwise
      `test_fraction` of all images, chosen by a fixed seed over the sorted file names, is the test
      set.
    * Images that lie in subfolders of a split get the subfolder's name as label, unless some image
      lies beside them.
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
        train, test = self._splits(root, cfg.test_fraction)
        channels = cfg.channels or _channels_of(train[0][0])
        names = [name for _, name in train + test]
        classes = (
            None
            if any(name is None for name in names)
            else sorted({name for name in names if name})
        )
        spec = DataSpec(
            name=cfg.name,
            channels=channels,
            image_size=cfg.image_size,
            padding=0,
            binary=False,
            num_classes=len(classes) if classes else None,
            flip=True if cfg.flip is None else cfg.flip,
            affine=cfg.augment == "affine",
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
        return Datasets(sets[0], sets[1], spec)

    @staticmethod
    def _splits(root: Path, test_fraction: float) -> list[list[tuple[Path, str | None]]]:
        test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if (root / "train").is_dir() and test_folder is not None:
            return [_find_images(root / "train"), _find_images(test_folder)]
        images = _find_images(root)
        if len(images) < 2:
            raise UserError(
                f"data.root: {root} has one image only; training and testing need at least two"
            )
        order = np.random.default_rng(0).permutation(len(images))
        held_out = min(max(round(test_fraction * len(images)), 1), len(images) - 1)
        return [[images[i] for i in sorted(part)] for part in (order[held_out:], order[:held_out])]


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

    def _decode(self, item: int) -> Tensor:
        return read_image(self.paths[item], self.image_size, self.channels)


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """Return an image file as uint8 with shape (channels, size, size): shorter side resized, centre
    cropped.

    Raises:
        UserError: If the file is not an image that can be decoded.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion would clip it
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({' '.join(str(error).split())})") from error
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
    array = np.array(image, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _channels_of(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return 1 if image.mode in ("1", "L", "LA", "I;16", "I;16B", "I") else 3
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable image ({' '.join(str(error).split())})") from error


def _find_images(folder: Path) -> list[tuple[Path, str | None]]:
    """Return all images below `folder`, sorted, each with the name of its first-level subfolder or
    None.
    """
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()
    )
    if not files:
        raise UserError(f"data.root: no image in {folder} (accepted: {' '.join(EXTENSIONS)})")
    parts = [(path, path.relative_to(folder).parts) for path in files]
    labelled = all(len(names) > 1 for _, names in parts)
    return [(path, names[0] if labelled else None) for path, names in parts]
