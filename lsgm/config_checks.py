"""Checks of a configuration's values: ``ValueError("field: what is wrong")``."""

from __future__ import annotations

import math

__all__ = ["require", "require_fraction", "require_non_negative", "require_positive"]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_positive(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(value is None or value > 0, f"{name}: must be positive, not {value}")


def require_non_negative(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(value >= 0 and math.isfinite(value), f"{name}: must be at least 0, not {value}")


def require_fraction(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        require(0.0 <= value <= 1.0, f"{name}: must lie in [0, 1], not {value}")
