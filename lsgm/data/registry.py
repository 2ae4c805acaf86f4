"""Datasets as a configuration names them."""

from __future__ import annotations

from lsgm.config.training import DataConfig
from lsgm.data.spec import Datasets
from lsgm.registry import DATASETS

__all__ = ["DATASETS", "build_datasets"]


def build_datasets(cfg: DataConfig) -> Datasets:
    """Return the train and test images that `cfg` names, downloading them where they are missing.

    Raises:
        UserError: If files are missing and cannot be fetched, or are damaged; the message says what
            to do.
    """
    datasets: Datasets = DATASETS[cfg.name]()(cfg)
    return datasets
