"""Datasets in [0, 1], their order in training, and what is done to a batch before the model."""

from lsgm.data.arrays import ArrayDataset
from lsgm.data.batches import Batches, epoch_order, fitting_batch_size, random_subset
from lsgm.data.folder import FolderDataset
from lsgm.data.pixels import Pixels
from lsgm.data.preprocess import (
    binarise,
    fixed_binarisation,
    preprocess,
    random_affine,
    random_flip,
    reduce_bits,
)
from lsgm.data.registry import DATASETS, build_datasets
from lsgm.data.spec import Datasets, DataSpec, ImageDataset, LabelledImages

__all__ = [
    "DATASETS",
    "ArrayDataset",
    "Batches",
    "DataSpec",
    "Datasets",
    "FolderDataset",
    "ImageDataset",
    "LabelledImages",
    "Pixels",
    "binarise",
    "build_datasets",
    "epoch_order",
    "fitting_batch_size",
    "fixed_binarisation",
    "preprocess",
    "random_affine",
    "random_flip",
    "random_subset",
    "reduce_bits",
]
