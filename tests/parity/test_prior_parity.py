from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_fixtures import parametrize_files, prior_fixture, relative
from published import FLOAT32_ROUNDING
from torch import Tensor, nn

from lsgm.importers.official_prior import (
    load_official_prior,
    prior_arguments,
    published_modules,
)
from lsgm.networks.layers import AttentionBlock, GroupNormSiLU
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.tensors import expand_like

priors = parametrize_files("prior_*.pt")
recorded_priors = parametrize_files("prior_*.pt", own=False)


@priors
@pytest.mark.parametrize("weights", ["raw", "ema"])
@torch.no_grad()
def test_network_and_mixed_prediction(path: Path, weights: str) -> None:
    fixture = prior_fixture(path)
    score, arrays = fixture.scores[weights], fixture.arrays
    x, t = arrays["net_x"], arrays["net_t"]
    assert relative(score.residual(x, t), arrays[f"net_out_{weights}"]) < 1e-5
    assert relative(score(x, t), arrays[f"mixed_{weights}"]) < 1e-5


@priors
@torch.no_grad()
def test_time_features_scalar_time_and_mask(path: Path) -> None:
    fixture = prior_fixture(path)
    arrays = fixture.arrays
    score = copy.deepcopy(fixture.scores["ema"])
    features = score.network.embedding.features(arrays["net_t"])
    torch.testing.assert_close(features, arrays["temb"], rtol=0, atol=1e-5)
    x = arrays["net_x"]
    assert (
        relative(score.residual(x, arrays["net_scalar_t"]), arrays["net_out_scalar_t_ema"]) < 1e-5
    )
    score.channel_mask.copy_(arrays["is_active"].view(1, -1, 1, 1))
    assert relative(score.residual(x, arrays["net_t"]), arrays["net_out_masked_ema"]) < 1e-5


@recorded_priors
@torch.no_grad()
def test_every_module_gives_what_the_published_one_gives(path: Path) -> None:
    """Mean, standard deviation and first values of every numbered module's output."""
    fixture = prior_fixture(path)
    network = fixture.scores["ema"].network
    modules = published_modules(network)
    trace: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Tensor | None) -> None:
        if output is None:  # a pyramid, which works on the network's state
            output = inputs[0].h
        if isinstance(module, GroupNormSiLU):  # the published module is the normalisation alone
            output = nn.GroupNorm.forward(module, inputs[0])
        flat = output.double().flatten()
        trace[module] = torch.cat([flat.mean()[None], flat.std()[None], flat[:4]])

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        network(fixture.arrays["net_x"], fixture.arrays["net_t"])
    finally:
        for hook in hooks:
            hook.remove()
    expected = fixture.arrays["trace_ema"].double()
    assert len(trace) == len(expected)
    actual = torch.stack([trace[module] for module in modules])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@priors
@torch.no_grad()
def test_probability_flow_velocity(path: Path) -> None:
    """``f z + g2 eps / (2 sqrt(var))``, the reference in float32.

    The reference's variance has lost digits at small times (19% at 1e-6 for VP without smoothing).
    With its literal float32 form the velocity is the recorded one at every time; ours, exact, is
    that up to the rounding of the variance.
    """
    fixture = prior_fixture(path)
    score, arrays, published = fixture.scores["ema"], fixture.arrays, fixture.published
    x, sde, mixing = arrays["ode_vel_x"], score.sde, score.mixing
    for t, expected in zip(arrays["ode_vel_t"], arrays["ode_vel"], strict=True):
        # 1 - var cancels near t = 1 in float32, and depends on how r^t is formed
        limit = 5e-4 if published.sde_type == "geometric_sde" else 1e-5
        # drift and score cancel near t = 1 where the score is almost Normal
        drift = published.f(t) * x
        limit += 16 * FLOAT32_ROUNDING * (drift.abs().max() / expected.abs().max()).item()
        normal = published.var(t).sqrt() / published.total(t) * x
        eps = (1 - mixing) * normal + mixing * score.residual(x, t)
        literal = drift + 0.5 * published.g2(t) / published.var(t).sqrt() * eps
        assert relative(literal, expected) < limit, t
        exact = t.double()
        coefficient = 0.5 * sde.g2(exact) / sde.var(exact).sqrt()
        velocity = sde.f(exact) * x + expand_like(coefficient, x) * score(x, exact)
        rounding = published.rounding(exact).item()
        assert relative(velocity, expected) < limit + rounding, t


@priors
def test_cross_entropy_constant(path: Path) -> None:
    """Of the recorded float32 form exactly, and of ours up to that form's rounding."""
    fixture = prior_fixture(path)
    sde, published = fixture.scores["ema"].sde, fixture.published
    expected = fixture.arrays["ce_const"].item()
    assert published.constant(sde.time_eps) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    rounding = published.rounding(torch.tensor(sde.time_eps, dtype=torch.float64)).item()
    assert sde.cross_entropy_constant() == pytest.approx(
        expected, rel=1e-6, abs=1e-6 + 0.5 * rounding
    )


@priors
def test_arguments(path: Path) -> None:
    fixture = prior_fixture(path)
    arguments = prior_arguments(fixture.raw["args"])
    arrays = fixture.arrays
    assert (arguments.channels, arguments.resolution) == tuple(arrays["net_x"].shape[1:3])
    sides = [arguments.resolution >> i for i in range(arguments.network["num_scales"])]
    assert sides == arrays["resolutions"].tolist()
    assert arguments.mixed == fixture.args.get("mixed_prediction", True)
    assert arguments.sde == fixture.scores["raw"].sde
    assert arguments == prior_arguments(fixture.args)


@priors
def test_no_weight_is_left_over_or_untouched(path: Path) -> None:
    """All published numbers arrive once: the same count, and the same sum of squares."""
    fixture = prior_fixture(path)
    published = {k: v for k, v in fixture.raw["dae_state_dict"].items() if k != "temb_fun.w"}
    parameters = list(fixture.scores["raw"].parameters())
    assert sum(p.numel() for p in parameters) == sum(v.numel() for v in published.values())
    ours = sum(p.detach().double().square().sum() for p in parameters)
    theirs = sum(v.double().square().sum() for v in published.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@priors
def test_ema_is_taken_from_the_optimizer_or_already_in_place(path: Path) -> None:
    fixture = prior_fixture(path)
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            fixture.scores["raw"].parameters(), fixture.scores["ema"].parameters(), strict=True
        )
    )
    assert same == ("dae_optimizer" not in fixture.raw)


@priors
def test_mistakes_name_what_is_wrong(path: Path) -> None:
    fixture = prior_fixture(path)
    raw = fixture.raw
    with pytest.raises(ValueError, match="first-stage"):
        load_official_prior({"args": raw["args"]})
    with pytest.raises(ValueError, match="'raw' or 'ema'"):
        load_official_prior(raw, "best")  # type: ignore[arg-type]
    state = dict(raw["dae_state_dict"])
    with pytest.raises(ValueError, match=r"belong nowhere: all_modules\.99\.weight"):
        load_official_prior(
            {**raw, "dae_state_dict": {**state, "all_modules.99.weight": torch.ones(1)}}, "raw"
        )
    state.pop("all_modules.2.bias")
    with pytest.raises(ValueError, match="conv_in"):
        load_official_prior({**raw, "dae_state_dict": state}, "raw")
    with pytest.raises(ValueError, match="'sde_type'"):
        prior_arguments({k: v for k, v in fixture.args.items() if k != "sde_type"})


def test_published_order_of_the_example() -> None:
    """Two levels of one block at side 16: 18 modules, of which 4, 8 and 15 are attention."""
    network = NCSNpp(
        12, 16, num_channels=16, num_scales=2, num_cells_per_scale=1, embedding_type="fourier"
    )
    modules = published_modules(network)
    assert len(modules) == 18
    assert [k for k, module in enumerate(modules) if isinstance(module, AttentionBlock)] == [
        4,
        8,
        15,
    ]
