"""Whether the mean of an importance-sampled estimate can be believed, from its observed tail.

Where the weights of a proposal have no bound, the few largest draws decide a mean. Most samples
hold none of them, so that an unbiased estimate is too low most of the time, with a standard error
that is too small.
"""

from __future__ import annotations

import warnings

from torch import Tensor

__all__ = [
    "HEAVY_TAIL",
    "HeavyTailWarning",
    "tail_share",
    "warn_of_tail",
]

HEAVY_TAIL = 0.6
"""Share of the variance from a hundredth of the draws beyond which a mean is not to be trusted.

Of Normal draws it is 0.08, of exponential ones 0.22; where the variance is infinite it tends to 1.
"""


FEWEST = 50
"""Draws below which the largest one says nothing about the tail."""


class HeavyTailWarning(UserWarning):
    """A mean that a few draws decide."""


def tail_share(values: Tensor) -> float | None:
    """Share of the sum of squared deviations from the mean that the hundredth (at least one) of
    ``values (N,)`` farthest from it makes; None for fewer than :data:`FEWEST` values or equal ones.
    """
    if len(values) < FEWEST:
        return None
    squares = (values.double() - values.double().mean()).square()
    total = squares.sum().item()
    if total == 0:
        return None
    return squares.topk(max(1, len(values) // 100)).values.sum().item() / total


def warn_of_tail(values: Tensor, what: str) -> float | None:
    """:func:`tail_share` of ``values (N,)``, with a warning if it is large.

    Warns:
        HeavyTailWarning: If the share exceeds :data:`HEAVY_TAIL`.
    """
    share = tail_share(values)
    if share is not None and share > HEAVY_TAIL:
        warnings.warn(
            f"{what}: {share:.0%} of the scatter comes from 1% of {len(values)} draws; the mean is "
            "likely too low and its standard error too small: average more samples an image",
            HeavyTailWarning,
            stacklevel=2,
        )
    return share
