"""The datasets by name.

A new one is a callable DataConfig -> Datasets, its line here, and its name in `DataConfig.name`.
"""

from __future__ import annotations

from collections.abc import Callable

from lsgm.config.training import DataConfig
from lsgm.data.folder import Folder
from lsgm.data.sources import CIFAR10, MNIST, OMNIGLOT, Digits
from lsgm.data.spec import Datasets

__all__ = ["DATASETS", "build_datasets"]

DATASETS: dict[str, Callable[[DataConfig], Datasets]] = {
    "digits": Digits(),
    "mnist": MNIST(),
    "omniglot": OMNIGLOT(),
    "cifar10": CIFAR10(),
    "folder": Folder(),
}


def build_datasets(cfg: DataConfig) -> Datasets:
    """Return the train and test images that `cfg` names, downloading them where they are missing.

    Raises:
        UserError: If files are missing and cannot be fetched, or are damaged; the message says what
            to do.
    """
    return DATASETS[cfg.name](cfg)
