from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from prior_fixtures import ArraySet, array_sets, parametrize_files
from published import draw_times

from lsgm.importers.official_prior import WEIGHTINGS
from lsgm.times import make_proposal
from lsgm.weighting import Weighting, make_weighting


def published_factor(mode: str, case: ArraySet) -> float:
    """What the published weights of a mode are too large by.

    * Uniform times (which ``rescale_iw`` uses as well): the published estimate is a mean over
      ``[time_eps, 1]``, ours is the integral, like every importance-sampled one: ``1 / (1 -
      time_eps)``.
    * ``drop_all_iw`` for VP and sub-VP: the published normaliser of the truncated Gaussian lacks a
      factor ``beta_start`` in an exponent, ``exp(q / 2)`` for ``exp(beta_start q / 2)`` with ``q =
      beta_start / (beta_end - beta_start)``. Ours is the normaliser; ``tests/test_times.py`` holds
      it against quadrature for every SDE.
    """
    sde = case.sde
    if mode.endswith("_uniform") or mode == "rescale_iw":
        return 1 / (1 - sde.time_eps)
    if mode == "drop_all_iw" and case.kind in ("vpsde", "subvpsde"):
        q = sde.beta_start / (sde.beta_end - sde.beta_start)
        return math.exp(q * (1 - sde.beta_start) / 2)
    return 1.0


def mode_of(path: Path) -> str:
    return next(
        mode for mode in sorted(WEIGHTINGS, key=len, reverse=True) if path.stem.endswith(mode)
    )


def weights_of(case: ArraySet, weighting: Weighting, proposal: str) -> dict[str, torch.Tensor]:
    sample = make_proposal(proposal, case.sde, weighting).from_uniform(case.arrays["rho"])
    likelihood = make_weighting("likelihood")
    return {
        "t": sample.t,
        "wp": weighting(case.sde, sample.t) * sample.inverse_density,
        "wq": likelihood(case.sde, sample.t) * sample.inverse_density,
        "var": case.sde.var(sample.t),
        "m": case.sde.mean_coef(sample.t),
        "g2": case.sde.g2(sample.t),
    }


@parametrize_files("iw_*.npz")
def test_times_and_weights(path: Path) -> None:
    """Against the float64 arrays at 1e-10, and the float32 arrays at what single precision leaves
    of them for the SDE's own parameters.
    """
    mode = mode_of(path)
    weighting_name, proposal = WEIGHTINGS[mode]
    weighting = make_weighting(weighting_name)
    for case in array_sets(path):
        if case.sde.prior_var > 1 and weighting_name == "rescaled":
            # the published weight is negative here; ours refuses
            assert bool((case.arrays["wp"] < 0).any())
            with pytest.raises(ValueError, match="var < 1"):
                weighting(case.sde, torch.ones(1))
            continue
        ours = weights_of(case, weighting, proposal)
        factor = published_factor(mode, case)
        inner = case.arrays["rho"] < 0.999
        # the constants of the truncated Gaussian are float32 in the reference, whatever the input
        single = mode == "drop_all_iw" and case.kind in ("vpsde", "subvpsde")
        for key, value in ours.items():
            scaled = (value * factor if key in ("wp", "wq") else value)[inner]
            for prefix in ("f64_", ""):
                expected = case.arrays[prefix + key].double()[inner]
                rtol, atol = (2e-5 if single else 1e-10), 1e-13
                if not prefix:
                    rtol = 5e-4 + case.published.end_rounding(ours["t"][inner])
                if key == "t" and (single or not prefix):
                    atol = 1e-6 + case.published.time_rounding(ours["t"][inner])
                if key in ("var", "m", "g2") and (single or not prefix):
                    atol = 1e-6 * expected.abs().max().item()
                excess = (scaled - expected).abs() - (atol + rtol * expected.abs())
                assert excess.max() <= 0, f"{path.stem} {prefix}{key}: {excess.max():.1e} too far"


@parametrize_files("iw_*.npz", own=False)
def test_the_draws_written_out_here_are_the_published_ones(path: Path) -> None:
    """Those of ``published.py``, in float64 and, where single precision leaves digits, float32."""
    for case in array_sets(path):
        inner = case.arrays["rho"] < 0.999
        for prefix, rho in (("", case.arrays["rho"]), ("f64_", case.arrays["rho"].double())):
            draw = draw_times(mode_of(path), case.published, rho)
            values = {"t": draw.t, "var": draw.var, "m": draw.mean, "g2": draw.g2}
            for key, value in (values | {"wp": draw.wp, "wq": draw.wq}).items():
                expected = case.arrays[prefix + key].double()
                # the truncated Gaussian has float32 constants, whatever the input
                rtol = 1e-4 if not prefix else 2e-5 if "drop_all_iw" in path.stem else 1e-9
                excess = (value.double() - expected).abs() - rtol * expected.abs()
                excess -= 1e-6 if key == "t" and rtol > 1e-9 else 1e-13
                assert excess[inner].max() <= 0, f"{path.stem} {prefix}{key}"


@parametrize_files("iw_*.npz")
def test_the_last_uniform(path: Path) -> None:
    """At ``rho = 1 - 2^-24`` float32 leaves ``1 - var`` few digits; the weights agree to those."""
    mode = mode_of(path)
    weighting_name, proposal = WEIGHTINGS[mode]
    weighting = make_weighting(weighting_name)
    for case in array_sets(path):
        if case.sde.prior_var > 1 and weighting_name == "rescaled":
            continue
        ours = weights_of(case, weighting, proposal)
        last = case.arrays["rho"].argmax()
        rounding = case.published.end_rounding(ours["t"][last]).item()
        for key in ("t", "wp", "wq"):
            scaled = ours[key][last] * (published_factor(mode, case) if key != "t" else 1)
            assert scaled.item() == pytest.approx(
                case.arrays[key][last].item(), rel=1e-2 + rounding
            )
