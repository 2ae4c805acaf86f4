"""Options of scores of samples."""

from __future__ import annotations

from dataclasses import dataclass

from lsgm.config.checks import require_at_most
from lsgm.sampling.sampler import MAX_COUNT

__all__ = [
    "QualityOptions",
]


@dataclass(frozen=True)
class QualityOptions:
    """Scores of samples against the test images."""

    extractor: str | None = None
    """Features: classifier (of the dataset's own labels; trained once, about a minute),
    efficientnet_lite0, inception (FID). None: no scores."""
    num: int = 2048
    """Number of samples."""
    nfe: tuple[int, ...] = ()
    """Other numbers of network evaluations to score the samples at; beside an adaptive sampler,
    with the model's own."""
    images: str = "draws"
    """Binary data: draws (one Bernoulli draw a pixel) or means (grey decoder means)."""
    neighbours: int = 3
    """Neighbour that sets the radius of precision and recall."""
    subsets: int = 100
    """Subsets of the kernel distance, of 1000 images at most."""
    cache: str | None = None
    """Folder of trained classifiers and features of data. None: LSGM_CACHE, else
    ~/.cache/lsgm/evaluation."""
    seed: int = 0
    """Seed of the subsets, of the groups of standard errors and of the choice of training images.
    """

    def __post_init__(self) -> None:
        require_at_most(self, MAX_COUNT, "num neighbours subsets")
        if self.num < 20:
            raise ValueError(f"num: must be 20 at least, not {self.num}")
        if min((self.neighbours, self.subsets, *self.nfe)) <= 0:
            raise ValueError("nfe, neighbours, subsets: must be positive")
        if self.images not in ("draws", "means"):
            raise ValueError(f"images: must be draws or means, not {self.images}")
