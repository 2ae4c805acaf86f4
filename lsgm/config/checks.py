"""Checks of a configuration's values: ``ValueError("field: what is wrong")``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lsgm.errors import require

__all__ = [
    "check_values",
    "require",
    "require_at_most",
    "require_fraction",
    "require_non_negative",
    "require_positive",
]


UNBOUNDED = ("churn_max",)
"""Numbers that may be infinite."""


LARGEST_FLOAT32 = 3.4e38
"""Networks and optimizers compute in float32."""


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse what no field may hold, in a section and those in it: numbers that are not finite or
    too large to compute with, and references to the environment, which are never expanded.

    Raises:
        ValueError: The message names the whole key.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{prefix}{item.name}.")
            continue
        for part in value if isinstance(value, tuple) else (value,):
            _check_value(f"{prefix}{item.name}", part, item.name in UNBOUNDED)


def _check_value(key: str, value: Any, unbounded: bool) -> None:
    if isinstance(value, str):
        require(
            "${" not in value, f"{key}: ${{...}} is not expanded here; write what it stands for"
        )
    elif isinstance(value, int):
        require(abs(value) < 2**63, f"{key}: must be below 2^63 in size, not {value:.3g}")
    elif isinstance(value, float):
        finite = math.isfinite(value) or (unbounded and not math.isnan(value))
        require(finite, f"{key}: must be finite, not {value}")
        beyond = math.isfinite(value) and abs(value) > LARGEST_FLOAT32
        require(not beyond, f"{key}: must be below {LARGEST_FLOAT32:.3g} in size, not {value:.3g}")


def require_positive(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(value is None or value > 0, f"{name}: must be positive, not {value}")


def require_at_most(section: object, most: int, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(value is None or value <= most, f"{name}: must be at most {most}, not {value}")


def require_non_negative(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(value >= 0 and math.isfinite(value), f"{name}: must be at least 0, not {value}")


def require_fraction(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(0.0 <= value <= 1.0, f"{name}: must lie in [0, 1], not {value}")
