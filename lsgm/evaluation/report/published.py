"""Published likelihoods, to stand beside a measured one. They are context, not a comparison: data
files, binarisation and numbers of importance weights differ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "PUBLISHED",
    "PublishedTable",
    "PublishedNumber",
    "published_for",
]

READ = "from the method's paper or repository"


SECOND_HAND = "as another paper's table quotes it"


@dataclass(frozen=True)
class PublishedNumber:
    """``nats``: negative log-likelihood of a test image; a ``bound`` is at most that."""

    model: str
    nats: float
    citation: str
    source: str
    bound: bool = False


@dataclass(frozen=True)
class PublishedTable:
    """Numbers on a dataset's test images, worst first, and how their data differ from ours."""

    data: str
    num_test: int
    numbers: tuple[PublishedNumber, ...]

    def caveat(self, num_test: int) -> str:
        """Why a number measured on ``num_test`` test images here is not one of these."""
        difference = (
            f"the test set here has {num_test} images and the published one {self.num_test}: "
            "this data file is not the published one, and differences of nats may come from the "
            "data alone"
            if num_test != self.num_test
            else "the images are the same; the binarisation here is one fixed seeded draw an image"
        )
        return f"{self.data} Context only: {difference}."

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


PUBLISHED: dict[str, PublishedTable] = {
    "omniglot": PublishedTable(
        "OMNIGLOT at 28x28, dynamically binarised.",
        8070,
        (
            PublishedNumber("IWAE code, 1 stochastic layer, k = 1", 114.68, "1509.00519", READ),
            PublishedNumber("IWAE code, 1 stochastic layer, k = 5", 112.25, "1509.00519", READ),
            PublishedNumber("IWAE code, 1 stochastic layer, k = 50", 110.31, "1509.00519", READ),
            PublishedNumber("VAE, one layer", 108.34, "2004.04795", SECOND_HAND),
            PublishedNumber("VampPrior, one layer", 106.78, "1705.07120", SECOND_HAND),
            PublishedNumber("Exemplar VAE, one layer", 105.22, "2004.04795", SECOND_HAND),
            PublishedNumber("IWAE, 2 stochastic layers", 103.38, "1509.00519", SECOND_HAND),
            PublishedNumber("VLAE", 89.83, "1611.02731", SECOND_HAND),
            PublishedNumber("LSGM (NELBO by the ODE)", 87.79, "2106.05931", SECOND_HAND, True),
        ),
    ),
    "mnist": PublishedTable(
        "MNIST, dynamically binarised.",
        10000,
        (
            PublishedNumber("VAE of the IWAE paper", 86.76, "1509.00519", SECOND_HAND),
            PublishedNumber("IWAE, 1 layer, k = 50", 84.78, "1509.00519", SECOND_HAND),
            PublishedNumber("IWAE, 2 layers, k = 50", 82.90, "1509.00519", SECOND_HAND),
            PublishedNumber("HVAE, VampPrior", 81.24, "1705.07120", SECOND_HAND),
            PublishedNumber("LSGM (NELBO by the ODE)", 78.47, "2106.05931", SECOND_HAND, True),
            PublishedNumber("BIVA", 78.41, "1902.02102", SECOND_HAND),
            PublishedNumber("NVAE", 78.01, "2007.03898", SECOND_HAND),
        ),
    ),
}
"""By dataset; the citation is an arXiv number."""


def published_for(dataset: str) -> PublishedTable | None:
    """The numbers on this dataset, if there are any here."""
    return PUBLISHED.get(dataset)
