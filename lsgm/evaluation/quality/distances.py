"""Distances between two sets of images, computed on their features ``(N, D)``.

The kernel distance, precision and recall, and the inception score are torch-fidelity's own
functions, called on features; the Frechet distance and the neighbours are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lsgm.errors import UserError
from lsgm.system.torchvision import import_torchvision

__all__ = [
    "InceptionScore",
    "KernelDistance",
    "Moments",
    "Neighbours",
    "PrecisionRecall",
    "SmallSampleWarning",
    "frechet_distance",
    "import_torch_fidelity",
    "inception_score",
    "inside_support",
    "jackknife",
    "jackknife_error",
    "jackknife_groups",
    "kernel_distance",
    "kernel_distance_replicates",
    "nearest_neighbours",
    "precision_recall",
    "small_sample_notes",
]

RECOMMENDED_SAMPLES = 2048
"""Below this many images the bias of the Frechet distance is large (1801.01401, Sec. 4)."""


class SmallSampleWarning(UserWarning):
    """Too few images for the number to mean what its name says."""


def import_torch_fidelity(submodule: str = "") -> ModuleType:
    """torch-fidelity or one of its submodules, where torchvision's compiled operators may be
    missing.

    Raises:
        UserError: It is not installed.
    """
    import importlib

    import_torchvision()  # declares what torch-fidelity's own import would stumble over
    try:
        return importlib.import_module(
            f"torch_fidelity.{submodule}" if submodule else "torch_fidelity"
        )
    except ModuleNotFoundError as error:
        raise UserError(
            "scores of sample quality need torch-fidelity: pip install 'lsgm[metrics]'"
        ) from error


@dataclass(frozen=True)
class Moments:
    """``mean`` ``(D,)``, unbiased ``covariance`` ``(D, D)``, both float64, and how many images gave
    them.
    """

    mean: Tensor
    covariance: Tensor
    num: int

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """From features ``(N, D)``, N > 1.

        Raises:
            ValueError: If there are fewer than two rows.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be (N, D) with N > 1, not {tuple(features.shape)}")
        x = features.double()
        mean = x.mean(0)
        centred = x - mean
        return cls(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Squared Frechet distance of the Gaussians with the moments of ``a`` and ``b`` (1706.08500,
    eq. 6): ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``.

    The trace of the root is a sum of square roots of eigenvalues of the symmetric
    ``S_a^(1/2) S_b S_a^(1/2)``, which are real and, up to rounding, not negative, for singular
    covariances too.

    Args:
        a: Features ``(N, D)`` or their moments.
        b: As ``a``, of the other set.

    Warns:
        SmallSampleWarning: If a set has no more images than features, so that its covariance is
            singular.
    """
    first, second = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} features against {len(second.mean)}")
    fewest = min(first.num, second.num)
    if fewest <= len(first.mean):
        warnings.warn(
            f"Frechet distance of {len(first.mean)} features from {fewest} images: "
            "the covariance is singular and the distance far too large",
            SmallSampleWarning,
            stacklevel=2,
        )
    return _frechet(first, second)


def _frechet(a: Moments, b: Moments) -> float:
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ b.covariance @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (
        (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    )
    return max(distance.item(), 0.0)


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (1801.01401).

    ``mean`` and ``deviation``: over random subsets, as torch-fidelity reports them; the deviation
    is the scatter of one subset, not the error of the mean.
    """

    mean: float
    deviation: float
    subsets: int
    subset_size: int

    @property
    def draw_error(self) -> float:
        """Standard error of the mean from the choice of subsets alone."""
        return self.deviation / math.sqrt(self.subsets)


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> KernelDistance:
    """The kernel distance of features ``(N, D)`` and ``(M, D)``; a subset has ``subset_size``
    images, or as many as the smaller set has.
    """
    size = min(subset_size, len(a), len(b))
    metric = import_torch_fidelity("metric_kid")
    found = metric.kid_features_to_metric(
        a.double(),
        b.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return KernelDistance(
        found[metric.KEY_METRIC_KID_MEAN], found[metric.KEY_METRIC_KID_STD], subsets, size
    )


@dataclass(frozen=True)
class PrecisionRecall:
    """``precision``: share of samples inside the support of the data; ``recall``: share of data
    inside that of the samples; supports are balls to the ``k``-th neighbour (1904.06991).
    """

    precision: float
    recall: float
    k: int


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of features ``(N, D)`` against ``(M, D)`` (1904.06991, eq. 1
    and 2).

    Raises:
        ValueError: If a set has no more than ``k`` images.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(f"precision with {k} neighbours needs more than {k} images of each kind")
    metric = import_torch_fidelity("metric_prc")
    found = metric.prc_features_to_metric(
        samples.double(),
        real.double(),
        prc_neighborhood=k,
        prc_batch_size=2000,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(found[metric.KEY_METRIC_PRECISION], found[metric.KEY_METRIC_RECALL], k)


@dataclass(frozen=True)
class InceptionScore:
    """``exp E KL(p(y|x) || p(y))`` (1606.03498, Sec. 4): mean and deviation over splits."""

    mean: float
    deviation: float
    splits: int


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 2020) -> InceptionScore:
    """The inception score from class logits ``(N, K)``, in a shuffled order, over ``splits``
    parts.
    """
    metric = import_torch_fidelity("metric_isc")
    found = metric.isc_features_to_metric(logits.double(), splits, True, seed)
    return InceptionScore(
        found[metric.KEY_METRIC_ISC_MEAN], found[metric.KEY_METRIC_ISC_STD], splits
    )


@dataclass(frozen=True)
class Neighbours:
    """``indices`` ``(N, k)`` into the training set and Euclidean ``distances`` ``(N, k)``, nearest
    first.
    """

    indices: Tensor
    distances: Tensor


def nearest_neighbours(queries: Tensor, train: Tensor, k: int = 1, block: int = 4096) -> Neighbours:
    """The ``k`` nearest rows of ``train`` ``(M, ...)`` to each row of ``queries`` ``(N, ...)``,
    features or pixels, by exact distances in float64.
    """
    if not 0 < k <= len(train):
        raise ValueError(f"{k} neighbours of {len(train)} images")
    x = queries.flatten(1).double()
    best = x.new_empty((len(x), 0))
    index = torch.empty((len(x), 0), dtype=torch.int64)
    for start in range(0, len(train), block):
        part = train[start : start + block].flatten(1).double()
        # Differences, not |x|^2 - 2xy + |y|^2: a copied training image has distance 0 exactly.
        far = torch.cdist(x, part, compute_mode="donot_use_mm_for_euclid_dist")
        best = torch.cat([best, far], dim=1)
        index = torch.cat([index, torch.arange(start, start + len(part)).expand_as(far)], dim=1)
        order = best.argsort(dim=1, stable=True)[:, :k]
        best, index = best.gather(1, order), index.gather(1, order)
    return Neighbours(index, best)


def jackknife_groups(num: int, groups: int = 10, seed: int = 0) -> tuple[Tensor, ...]:
    """Random parts of 0..num-1, of equal size up to one; the same for the same arguments."""
    if num < 2:
        raise ValueError("a standard error needs two images at least")
    # Not torch's generator: samples drawn from one of the same seed would decide their own groups.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(num))
    return order.tensor_split(min(groups, num))


def jackknife(
    statistic: Callable[[Tensor], float], num: int, *, groups: int = 10, seed: int = 0
) -> Tensor:
    """``statistic(kept indices)`` with one of the groups left out at a time, ``(groups,)``.

    A bias of the statistic that depends on the number of images alone (the Frechet distance has
    one of order 1/N) is shared by all of them and does not enter their spread.
    """
    parts = jackknife_groups(num, groups, seed)
    kept = (torch.cat([p for j, p in enumerate(parts) if j != i]) for i in range(len(parts)))
    return torch.tensor([statistic(index.sort().values) for index in kept], dtype=torch.float64)


def jackknife_error(replicates: Tensor) -> float:
    """Standard error of a statistic from its leave-one-group-out values ``(G,)``, over independent
    images; of a difference, from the differences of the values.
    """
    return math.sqrt((len(replicates) - 1) * replicates.var(correction=0).item())


def kernel_distance_replicates(a: Tensor, b: Tensor, *, groups: int = 10, seed: int = 0) -> Tensor:
    """:func:`jackknife` over ``a`` of the unbiased kernel distance of all of ``a`` and ``b``; the
    kernel is summed by blocks once.
    """
    x, y = a.double(), b.double()
    parts = jackknife_groups(len(x), groups, seed)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / x.shape[1] + 1) ** 3

    inner = torch.tensor(
        [[kernel(x[p], x[q]).sum().item() for q in parts] for p in parts], dtype=torch.float64
    )
    inner -= torch.diag(torch.stack([(x[p].square().mean(1) + 1).pow(3).sum() for p in parts]))
    cross = torch.stack([sum_blocks(kernel, x[p], y) for p in parts])
    outer = sum_blocks(kernel, y, y) - (y.square().mean(1) + 1).pow(3).sum()
    values = []
    for i, part in enumerate(parts):
        n, m = len(x) - len(part), len(y)
        own = inner.sum() - inner[i].sum() - inner[:, i].sum() + inner[i, i]
        values.append(
            own / (n * (n - 1)) + outer / (m * (m - 1)) - 2 * (cross.sum() - cross[i]) / (n * m)
        )
    return torch.stack(values)


def sum_blocks(
    kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, block: int = 1000
) -> Tensor:
    """Sum of ``kernel`` over all pairs, a block of rows at a time."""
    return torch.stack([kernel(part, y).sum() for part in x.split(block)]).sum()


def inside_support(points: Tensor, support: Tensor, k: int = 3, block: int = 1000) -> Tensor:
    """Whether each of ``points`` ``(N, D)`` lies within a row of ``support`` ``(M, D)`` no farther
    than that row's ``k``-th neighbour in ``support`` (1904.06991, eq. 1): ``(N,)`` bool.
    """
    points, support = points.double(), support.double()
    radii = torch.cat(
        [torch.cdist(p, support).kthvalue(k + 1).values for p in support.split(block)]
    )
    return torch.cat([(torch.cdist(p, support) <= radii).any(1) for p in points.split(block)])


def small_sample_notes(num_samples: int, num_real: int, num_features: int) -> tuple[str, ...]:
    """What a reader has to know about the sizes of the two sets, in sentences; empty if they are
    large enough.
    """
    notes = []
    for num, what in ((num_samples, "samples"), (num_real, "real images")):
        if num <= num_features:
            notes.append(
                f"{num} {what} for {num_features} features: their covariance is singular and the "
                "Frechet distance far too large."
            )
        elif num < RECOMMENDED_SAMPLES:
            notes.append(
                f"Only {num} {what}, fewer than {RECOMMENDED_SAMPLES}: the Frechet distance is "
                "biased upwards; compare it only at the same number."
            )
    return tuple(notes)
