"""The named datasets: scikit-learn's digits, MNIST, CIFAR-10 and OMNIGLOT."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lsgm.config.training import DataConfig
from lsgm.data.arrays import ArrayDataset
from lsgm.data.spec import Datasets, DataSpec
from lsgm.data.storage import data_root, download_file, fetch_into
from lsgm.errors import UserError
from lsgm.system.torchvision import import_torchvision

__all__ = ["CIFAR10", "Digits", "MNIST", "OMNIGLOT", "OMNIGLOT_URL"]

OMNIGLOT_URL = "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/chardata.mat"
ALPHABETS = 50


def _spec(
    cfg: DataConfig, channels: int, size: int, padding: int, *, binary: bool, classes: int | None
) -> DataSpec:
    if binary and (cfg.image_size not in (None, size) or cfg.image_width not in (None, size)):
        raise UserError(f"data.image_size: {cfg.name} has {size}x{size} images; leave it out")
    return DataSpec(
        name=cfg.name,
        channels=channels,
        image_size=size,
        padding=padding,
        binary=binary,
        num_classes=classes,
        flip=cfg.name == "cifar10" if cfg.flip is None else cfg.flip,
        affine=cfg.augment == "affine" or (cfg.augment == "auto" and cfg.name == "digits"),
        affine_padding="zeros" if binary else "reflection",
    )


class Digits:
    """1,797 handwritten digits that come with scikit-learn; the embedded default, for a quick run
    on a CPU.

    The 8x8 images have 17 grey levels. They are enlarged to 16x16 (bilinear), so that a hierarchy
    of latent scales has room, and treated as Bernoulli probabilities, like MNIST. One fifth of
    every class is the test set, by a fixed seed.
    """

    SIZE = 16
    TEST_FRACTION = 0.2

    def __call__(self, cfg: DataConfig) -> Datasets:
        from sklearn.datasets import load_digits

        digits = load_digits()
        grey = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
        large = interpolate(grey, size=(self.SIZE, self.SIZE), mode="bilinear", align_corners=False)
        images = (large * 255.0).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        in_test = torch.zeros(len(labels), dtype=torch.bool)
        generator = np.random.default_rng(0)
        for label in range(10):
            members = generator.permutation(np.flatnonzero(digits.target == label))
            in_test[members[: round(self.TEST_FRACTION * len(members))]] = True
        return Datasets(
            train=ArrayDataset(images[~in_test], labels[~in_test]),
            test=ArrayDataset(images[in_test], labels[in_test]),
            spec=_spec(cfg, 1, self.SIZE, 0, binary=True, classes=10),
        )


class MNIST:
    """MNIST: 60,000 + 10,000 digits of 28x28, zero-padded to 32x32, binarised; files below
    <root>/MNIST/raw.
    """

    PADDING = 2

    def __call__(self, cfg: DataConfig) -> Datasets:
        root = data_root(cfg.root)
        source = import_torchvision("datasets").MNIST
        advice = (
            f"put the four idx files of MNIST into {root / 'MNIST' / 'raw'}, "
            "or set data.root or LSGM_DATA"
        )
        splits = _torchvision_splits(source, root, root / "MNIST")
        if splits is None:
            fetch_into(
                root / "MNIST",
                lambda folder: _quietly(source, str(folder), download=True),
                advice,
            )
            splits = _torchvision_splits(source, root, root / "MNIST")
        if splits is None:
            raise UserError(f"{root / 'MNIST' / 'raw'}: files are missing; {advice}")
        for split in splits:
            _check_arrays(root / "MNIST" / "raw", split.data.shape, (28, 28), split.targets, 10)
        train, test = (
            ArrayDataset(split.data.unsqueeze(1), split.targets.long(), self.PADDING)
            for split in splits
        )
        return Datasets(train, test, _spec(cfg, 1, 28, self.PADDING, binary=True, classes=10))


class CIFAR10:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32; files below <root>/cifar-10-batches-py."""

    FOLDER = "cifar-10-batches-py"

    def __call__(self, cfg: DataConfig) -> Datasets:
        root = data_root(cfg.root)
        source = import_torchvision("datasets").CIFAR10
        if not (root / self.FOLDER).is_dir():
            fetch_into(
                root / self.FOLDER,
                lambda folder: _quietly(source, str(folder), download=True),
                "unpack cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html "
                f"into {root}, or set data.root or LSGM_DATA",
            )
        splits = _torchvision_splits(source, root, root / self.FOLDER)
        if splits is None:  # torchvision compares checksums before it opens a file
            raise UserError(
                f"{root / self.FOLDER}: files are missing or damaged; delete it and try again"
            )
        train, test = (
            ArrayDataset(
                torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(split.targets),
            )
            for split in splits
        )
        return Datasets(train, test, _spec(cfg, 3, 32, 0, binary=False, classes=10))


class OMNIGLOT:
    """OMNIGLOT at 28x28, the file that the likelihood literature uses, zero-padded to 32x32 and
    binarised.

    The file is <root>/omniglot/chardata.mat or <root>/chardata.mat, with `data` (784, N) and
    `testdata` (784, M): one image a column, pixels in column-major order, ink = 1. Labels are the
    50 alphabets, where the file has them.
    """

    SIZE = 28
    PADDING = 2

    def __call__(self, cfg: DataConfig) -> Datasets:
        root = data_root(cfg.root)
        places = [root / "omniglot" / "chardata.mat", root / "chardata.mat"]
        path = next((place for place in places if place.exists()), None)
        if path is None:
            path = places[0]
            fetch_into(
                path,
                lambda folder: _download_chardata(folder / "chardata.mat"),
                f"download {OMNIGLOT_URL} and put it at {path}, or set data.root or LSGM_DATA",
            )
        arrays = load_chardata(path)
        train, test = (
            ArrayDataset(
                column_major_images(arrays[name], self.SIZE),
                _alphabets(path, arrays, labels, arrays[name].shape[1]),
                self.PADDING,
            )
            for name, labels in (("data", "target"), ("testdata", "testtarget"))
        )
        classes = None if train.labels is None or test.labels is None else ALPHABETS
        return Datasets(
            train, test, _spec(cfg, 1, self.SIZE, self.PADDING, binary=True, classes=classes)
        )


def _torchvision_splits(source: Any, root: Path, folder: Path) -> list[Any] | None:
    """Both splits of a dataset of torchvision, or None where files are missing.

    Raises:
        UserError: Files in ``folder`` are damaged.
    """
    try:
        return [source(str(root), train=train, download=False) for train in (True, False)]
    except Exception as error:  # on damaged files the reader raises whatever it stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, RuntimeError) and "not found" in reason:
            return None
        raise UserError(
            f"{folder}: files are damaged ({reason}); delete it and try again"
        ) from error


def _check_arrays(
    folder: Path, shape: Sequence[int], image: tuple[int, ...], labels: Tensor, classes: int
) -> None:
    """Raise UserError unless these are images of this shape, each with one of the classes."""
    if len(shape) != 1 + len(image) or tuple(shape[1:]) != image or shape[0] == 0:
        raise UserError(
            f"{folder}: images of shape {tuple(shape)} where {('N', *image)} is needed".replace(
                "'", ""
            )
        )
    if labels.shape != (shape[0],):
        raise UserError(f"{folder}: {shape[0]} images, but labels of shape {tuple(labels.shape)}")
    if not (labels.min() >= 0 and labels.max() < classes):
        raise UserError(
            f"{folder}: labels {labels.min()} to {labels.max()} where 0 to {classes - 1} are needed"
        )


def load_chardata(path: Path) -> dict[str, np.ndarray]:
    """Read and check the OMNIGLOT file.

    Raises:
        UserError: If it is no MATLAB file, or `data` or `testdata` is missing, misshapen or outside
            [0, 1].
    """
    from scipy.io import loadmat

    try:
        arrays = loadmat(path)
    except Exception as error:  # on damaged files the reader raises whatever it stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: not a readable MATLAB file ({reason}); the right one is {OMNIGLOT_URL}"
        ) from error
    for name in ("data", "testdata"):
        if name not in arrays:
            found = (
                ", ".join(sorted(key for key in arrays if not key.startswith("__"))) or "nothing"
            )
            raise UserError(
                f"{path}: no array {name!r} (found: {found}); the right file is {OMNIGLOT_URL}"
            )
        array = arrays[name]
        if array.ndim != 2 or array.shape[0] != 784 or array.shape[1] == 0:
            raise UserError(
                f"{path}: {name!r} has shape {array.shape} where (784, number of images) is needed"
            )
        if array.dtype.kind not in "fiub" or not (
            np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1
        ):
            raise UserError(f"{path}: {name!r} has values that are not numbers in [0, 1]")
    return arrays


def column_major_images(array: np.ndarray, size: int) -> Tensor:
    """Return images (N, 1, size, size) from columns (size * size, N) whose pixels are in
    column-major order.

    Grey values that are multiples of 1/255 are kept as uint8, others as float32.
    """
    columns = torch.from_numpy(np.ascontiguousarray(array.T, dtype=np.float32))
    images = columns.view(-1, 1, size, size).transpose(2, 3).contiguous()
    levels = (images * 255.0).round()
    return (
        levels.to(torch.uint8)
        if torch.allclose(levels, images * 255.0, rtol=0.0, atol=1e-3)
        else images
    )


def _alphabets(path: Path, arrays: dict[str, np.ndarray], name: str, count: int) -> Tensor | None:
    """The alphabets ``(count,)`` of the one-hot array ``name``, or None where it is missing."""
    one_hot = arrays.get(name)
    if one_hot is None:
        return None
    if one_hot.shape != (ALPHABETS, count):
        raise UserError(
            f"{path}: {name!r} has shape {one_hot.shape} where {(ALPHABETS, count)} is needed"
        )
    is_number = one_hot.dtype.kind in "fiub"
    if not is_number or not (np.isin(one_hot, (0, 1)).all() and (one_hot.sum(0) == 1).all()):
        raise UserError(
            f"{path}: {name!r} must have one 1 in each column, the image's alphabet, and else zeros"
        )
    return torch.from_numpy(one_hot.argmax(0).astype(np.int64))


def _download_chardata(path: Path) -> None:
    download_file(OMNIGLOT_URL, path)
    try:
        load_chardata(path)
    except UserError as error:  # fetch_into says where the file was to go
        raise OSError(f"what {OMNIGLOT_URL} sent is not the OMNIGLOT file") from error


def _quietly(source: type, *args: str, **options: bool) -> None:
    """Build a torchvision dataset without its messages and progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        source(*args, **options)
