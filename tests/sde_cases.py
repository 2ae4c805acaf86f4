"""One or more instances of every SDE, for tests that hold for all of them."""

from __future__ import annotations

import pytest

from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, LinearSDE, SubVPSDE

__all__ = ["CASES", "all_sdes"]

CASES: dict[str, LinearSDE] = {
    "vp": VPSDE(),
    "vp-s0": VPSDE(0.2, 12.0, 1e-3, 5e-3),
    "vp-constant-beta": VPSDE(3.0, 3.0, 0.0, 1e-2),
    "geometric": GeometricVPSDE(),
    "geometric-s0": GeometricVPSDE(1e-4, 0.99, 1e-3, 1e-2),
    "subvp": SubVPSDE(),
    "subvp-s0": SubVPSDE(0.2, 15.0, 1e-3, 2e-2),
    "subvp-dip": SubVPSDE(0.1, 20.0, 0.05, 0.0),  # its variance falls from 0.05 before it rises
    "ve": VESDE(),
    "ve-wide": VESDE(1e-4, 5e4, 0.0),
}
all_sdes = pytest.mark.parametrize("sde", CASES.values(), ids=CASES.keys())
