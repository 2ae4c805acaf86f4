from __future__ import annotations

import math

import pytest
import torch
from quadrature import integrate
from sde_cases import CASES, all_sdes

from lsgm.sde import VESDE, LinearSDE
from lsgm.weighting import WEIGHTINGS, make_weighting


@all_sdes
def test_weights_are_positive_and_related(sde: LinearSDE) -> None:
    t = torch.linspace(max(sde.time_eps, 1e-3), 1, 100, dtype=torch.float64)
    likelihood = make_weighting("likelihood")(sde, t)
    reweighted = make_weighting("reweighted")(sde, t)
    torch.testing.assert_close(reweighted, likelihood * sde.var(t))
    assert torch.equal(make_weighting("unweighted")(sde, t), torch.ones_like(t))
    assert bool((likelihood > 0).all())
    if sde.prior_var <= 1:
        torch.testing.assert_close(
            make_weighting("rescaled")(sde, t) * 2 * (1 - sde.var(t)), torch.ones_like(t)
        )


def test_rescaled_weighting_refuses_a_variance_above_one() -> None:
    with pytest.raises(ValueError, match="var < 1"):
        make_weighting("rescaled")(VESDE(), torch.tensor([0.5]))


def test_names() -> None:
    assert list(WEIGHTINGS) == ["likelihood", "unweighted", "reweighted", "rescaled"]
    with pytest.raises(ValueError, match="known: likelihood"):
        make_weighting("drop_all")


@all_sdes
@pytest.mark.parametrize("data_var", [0.25, 1.0])
def test_cross_entropy_of_a_gaussian_is_exact(sde: LinearSDE, data_var: float) -> None:
    """Theorem 1 of arXiv 2106.05931, with the exact score of N(0, s) data instead of a network.

    Averaged over z0, the likelihood-weighted error, the entropy of the kernel at the cutoff and the
    divergence that is left at t = 1 add up to the entropy of the marginal at the cutoff.
    """
    weighting = make_weighting("likelihood")
    cutoff = max(sde.time_eps, 1e-3)

    def marginal(t: torch.Tensor) -> torch.Tensor:
        return data_var * sde.mean_coef(t).square() + sde.var(t)

    # E[eps | z_t] = sqrt(var) z_t / marginal leaves the error 1 - var / marginal
    error = integrate(lambda t: weighting(sde, t) * (1 - sde.var(t) / marginal(t)), cutoff)
    end = torch.ones((), dtype=torch.float64)
    left = 0.5 * torch.log(marginal(end) / sde.var(end)).item()
    entropy = 0.5 * math.log(
        2 * math.pi * math.e * marginal(torch.tensor(cutoff, dtype=torch.float64)).item()
    )
    total = error + left + sde.cross_entropy_constant(cutoff)
    assert total == pytest.approx(entropy, abs=1e-9)


def test_cases_cover_every_sde() -> None:
    assert len({type(sde) for sde in CASES.values()}) == 4
