from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prior_fixtures import array_sets, parametrize_files

from lsgm.sde import SubVPSDE


@parametrize_files("sde_*.npz")
def test_coefficients(path: Path) -> None:
    for case in array_sets(path):
        sde, arrays = case.sde, case.arrays
        t = arrays["t"]
        for name, key in (("f", "f"), ("g2", "g2"), ("mean_coef", "mean"), ("var", "var")):
            # the reference's 1 - var cancels near t = 1, in float64 as well
            near_end = case.kind == "geometric" and key in ("f", "g2", "mean")
            torch.testing.assert_close(
                getattr(sde, name)(t),
                arrays[key],
                rtol=1e-9 if near_end else 1e-10,
                atol=1e-14,
                msg=f"{case.kind} {name}",
            )
        torch.testing.assert_close(
            sde.normal_component(arrays["x"], t), arrays["mixing"], rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            sde.perturb(arrays["x"], t, arrays["noise"]), arrays["sample_q"], rtol=1e-10, atol=1e-12
        )


@parametrize_files("sde_*.npz", own=False)
def test_the_formulas_written_out_here_are_the_published_ones(path: Path) -> None:
    """Those of ``published.py``, from which the fixtures of our own making come."""
    for case in array_sets(path):
        sde, arrays = case.published, case.arrays
        for name in ("f", "g2", "mean", "var"):
            torch.testing.assert_close(
                getattr(sde, name)(arrays["t"]), arrays[name], rtol=1e-9, atol=1e-14
            )


@parametrize_files("sde_*.npz")
def test_inverse_variance(path: Path) -> None:
    for case in array_sets(path):
        sde, arrays = case.sde, case.arrays
        if isinstance(sde, SubVPSDE):
            vpsde = sde.vpsde
            torch.testing.assert_close(
                vpsde.var(arrays["t"]), arrays["var_vpsde"], rtol=1e-10, atol=1e-14
            )
            inverse, expected = vpsde.inverse_var(arrays["var_vpsde"]), arrays["inv_var_vpsde"]
        else:
            inverse, expected = sde.inverse_var(arrays["var"]), arrays["inv_var"]
        torch.testing.assert_close(inverse, expected, rtol=0, atol=1e-10)
        if "var_N" in arrays:
            torch.testing.assert_close(
                sde.total_var(arrays["t"]), arrays["var_N"], rtol=1e-10, atol=0
            )


@parametrize_files("sde_*.npz")
def test_cross_entropy_constant(path: Path) -> None:
    """The reference takes the variance in float32, where a small cutoff cancels it; ours is exact.

    The literal float32 form gives the recorded number everywhere, which shows that nothing else
    differs; ours gives it up to that rounding.
    """
    for case in array_sets(path):
        for cutoff, expected in zip(
            case.arrays["ce_eps"].tolist(), case.arrays["ce_const"].tolist(), strict=True
        ):
            assert case.published.constant(cutoff) == pytest.approx(expected, rel=1e-5, abs=1e-5)
            exact = case.sde.cross_entropy_constant(cutoff)
            rounding = case.published.rounding(torch.tensor(cutoff, dtype=torch.float64)).item()
            assert exact == pytest.approx(expected, rel=1e-6, abs=1e-6 + 0.5 * rounding)
