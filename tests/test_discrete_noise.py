"""Discrete diffusions: DDPM's levels, their limit, and training on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lsgm.config.architecture import PriorNetworkConfig, SamplerConfig, ScoreModelConfig, SDEConfig
from lsgm.data.spec import DataSpec
from lsgm.discrete_noise import BetaTable
from lsgm.errors import UserError
from lsgm.models.images import build_data_model
from lsgm.noise_ladder import LadderTimes
from lsgm.sde import VPSDE
from lsgm.training.stages.score import ScoreStage

SPEC = DataSpec("folder", 3, 8, 0, binary=False)
NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8, embedding_scale=1.0,
    attention_resolutions=(4,), block="ddpm", rescale=False, norm_groups=4,
)  # fmt: skip
DDPM = ScoreModelConfig(
    ncsnpp=NETWORK, sde=SDEConfig(time_eps=1e-5), dequantise=False, data_std=0.0,
    condition="index", discrete_levels=50,
)  # fmt: skip
SMLD = replace(
    DDPM,
    sde=SDEConfig(kind="vesde", sigma2_min=1e-4, sigma2_max=2500.0, time_eps=1e-5),
    data_range="unit",
    centre_input=True,
)


def build(config):
    torch.manual_seed(0)
    return build_data_model("score_sde", config, SamplerConfig(), SPEC)


def test_the_kernel_is_that_of_the_chain():
    """Simulated step by step, without a formula for the product."""
    table = BetaTable(0.1, 20.0, 50)
    m, var = 1.0, 0.0
    for i, beta in enumerate(table.betas.tolist()):
        m, var = (1 - beta) ** 0.5 * m, (1 - beta) * var + beta
        t = torch.tensor([i / 49], dtype=torch.float64)
        assert table.mean_coef(t).item() == pytest.approx(m, rel=1e-12)
        assert table.var(t).item() == pytest.approx(var, rel=1e-12)
    assert table.times.tolist() == pytest.approx([1 - i / 49 for i in range(50)])


def test_its_limit_is_the_vp_sde():
    sde, t = VPSDE(), torch.tensor([0.25, 0.5, 0.8], dtype=torch.float64)
    errors = []
    for n in (1000, 4000):
        table = BetaTable.of(sde, n)
        errors.append((table.mean_coef(t) / sde.mean_coef(t) - 1).abs().max().item())
    assert errors[0] < 0.05 and errors[1] == pytest.approx(errors[0] / 4, rel=0.2)


def test_too_few_levels():
    with pytest.raises(ValueError, match="more than beta_end = 20 levels, not 20"):
        BetaTable(0.1, 20.0, 20)
    with pytest.raises(UserError, match="score.discrete_levels: .* not 10"):
        build(replace(DDPM, discrete_levels=10))
    for wrong, message in (
        ({"discrete_levels": None}, "index needs discrete_levels"),
        ({"sde": SDEConfig(kind="subvpsde")}, "discrete_levels: needs at least two levels"),
        ({"condition": "ln_sigma"}, "ln_sigma needs sde.kind vesde"),
        ({"centre_input": True}, "centre_input: needs data_range unit"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(DDPM, **wrong)


@pytest.mark.parametrize(("config", "first"), [(DDPM, 49.0), (SMLD, 0.0)])
def test_the_network_is_told_the_level(config, first):
    """Whole numbers at the levels; from the most noise under VE, from the least under VP."""
    model = build(config)
    told = model.score.index(model.levels.times.float())
    whole = torch.arange(50.0) if first == 0 else torch.arange(49.0, -1, -1)
    assert (told - whole).abs().max() < 1e-5 and told[0] == first


@pytest.mark.parametrize("config", [DDPM, SMLD], ids=["ddpm", "smld"])
def test_training_sees_the_levels_only(config):
    model = build(config)
    stage = ScoreStage(model)
    assert isinstance(stage.proposal, LadderTimes)
    seen = []
    model.score.network.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    x = torch.zeros(64, 3, 8, 8)
    result = stage.loss(x, None, torch.Generator().manual_seed(0))
    levels = seen[0]
    assert (levels - levels.round()).abs().max() < 1e-5 and levels.unique().numel() > 30
    # a network that starts at zero predicts no noise: its error is that of the noise
    assert result.loss.item() == pytest.approx(3 * 64, rel=0.05)


def test_ddpm_blocks_add_up_plainly_and_resample_between_them():
    model = build(DDPM)
    network = model.score.network
    assert all(g.num_groups == 4 for g in network.modules() if isinstance(g, torch.nn.GroupNorm))
    block = network.middle_in.eval()
    x = torch.randn(2, 8, 4, 4)
    # the branch starts at (almost) zero, so that the block is the identity, not divided
    time = torch.randn(2, 32)
    torch.testing.assert_close(block(x, time), x, atol=1e-3, rtol=0)
    down = network.down[0].downsample
    assert [name for name, _ in down.named_parameters()] == [
        "resample.conv.weight",
        "resample.conv.bias",
    ]
    with pytest.raises(UserError, match="norm_groups 3 does not divide the width 8"):
        build(replace(DDPM, ncsnpp=replace(NETWORK, norm_groups=3)))


def test_it_learns():
    """Twenty steps on one image halve the error of the noise at high noise levels."""
    model = build(DDPM)
    stage = ScoreStage(model, reduction="mean")
    optimizer = torch.optim.Adam(model.score.parameters(), 3e-3)
    x, rng = torch.zeros(64, 3, 8, 8), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        loss = stage.scale * stage.loss(x, None, rng).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-5:]) / 5 < 0.5
