"""The benchmark of few-step sampling of images: its closed form, and a table of a case."""

from __future__ import annotations

import pytest
import torch

from lsgm.benchmark.few_step_images import (
    FewStepImagesOptions,
    ImageMixture,
    _case,
    measure_images,
)
from lsgm.sde import make_sde
from lsgm.solvers import make_grid, make_solver


def test_the_closed_form_is_the_score() -> None:
    """The gradient of the log density, by automatic differentiation."""
    sde = make_sde("vesde", sigma2_min=1e-4, sigma2_max=100.0, time_eps=1e-5)
    data = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    mixture = ImageMixture(sde, data, 0.1)
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    total = (0.1**2 + sde.var(t))[:, None]
    squares = (x[:, None] - data[None]).flatten(2).square().sum(2)
    density = (-0.5 * squares / total).logsumexp(1)
    (score,) = torch.autograd.grad(density.sum(), x)
    expected = -sde.var(t).sqrt()[:, None, None, None] * score
    assert torch.allclose(mixture.eps(x.detach(), t), expected, atol=1e-10)


def test_a_table_has_every_sampler(tmp_path) -> None:
    """The pilots' choice is the nearest of ours, and the published sampler has its own number."""
    pytest.importorskip("diffusers")
    sde = make_sde("vesde", sigma2_min=1e-4, sigma2_max=100.0, time_eps=1e-5)
    mixture = ImageMixture(sde, torch.rand(8, 1, 2, 2, dtype=torch.float64), 0.1)
    options = FewStepImagesOptions(nfe=(5,), samples=16, pilots=8)
    zero = torch.zeros((), dtype=torch.float64)
    case = _case("Case", sde, mixture.eps, (1, 2, 2), options, 1e-3, zero)
    chain = make_solver("discrete_pc", predictor="reverse_diffusion", denoise=True)
    text = measure_images(case, (chain, make_grid("time", sde, 49, 1e-3)), options)
    assert text.startswith("## Case\n\nVE, images of 1 x 2 x 2.")
    assert "Published sampler: 50 evaluations" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| normal_ref")]
    errors = {grid: float(error) for _, grid, error, *_ in rows}
    assert {"default (phi)", "pilot", "karras"} <= errors.keys()
    assert errors["pilot"] <= min(errors.values()) * 1.5
