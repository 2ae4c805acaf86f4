from __future__ import annotations

import pytest
import torch
from sde_cases import all_sdes
from torch import Tensor, nn

from lsgm.networks.ncsnpp import NCSNpp
from lsgm.score import MixedNormalScore
from lsgm.sde import VPSDE, LinearSDE


class Toy(nn.Module):
    """A network of which everything is known: ``scale x + t``."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = [x, t]
        return self.scale * x + t.view(-1, 1, 1, 1)


@all_sdes
def test_mix_of_normal_component_and_network(sde: LinearSDE) -> None:
    score = MixedNormalScore(Toy(), sde, 3)
    with torch.no_grad():
        score.mixing_logit.copy_(torch.tensor([-6.0, 0.0, 5.0]).view(1, 3, 1, 1))
    x, t = torch.randn(4, 3, 5, 5), torch.rand(4, dtype=torch.float64)
    a = torch.sigmoid(torch.tensor([-6.0, 0.0, 5.0])).view(1, 3, 1, 1)
    total = (1 - sde.sigma2_0) * sde.mean_coef(t) ** 2 + sde.var(t)
    normal = (sde.var(t).sqrt() / total).view(-1, 1, 1, 1) * x.double()
    expected = (1 - a) * normal + a * (2 * x + t.float().view(-1, 1, 1, 1))
    torch.testing.assert_close(score(x, t), expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.mixing, a)
    torch.testing.assert_close(score.residual(x, t), 2 * x + t.float().view(-1, 1, 1, 1))


def test_starts_as_the_normal_prior() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3, mixing_init=-30.0)
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    torch.testing.assert_close(score(x, t), VPSDE().normal_component(x, t))


def test_unmixed_score_is_the_network() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3, mixed=False)
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    assert torch.equal(score(x, t), score.residual(x, t))
    assert torch.equal(score.mixing, torch.ones(1, 3, 1, 1))
    assert [name for name, _ in score.named_parameters()] == ["network.scale"]


def test_gradients_reach_logit_network_and_input() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    score(x, torch.rand(2)).square().sum().backward()
    assert bool((score.mixing_logit.grad != 0).all())
    assert score.network.scale.grad != 0 and bool((x.grad != 0).all())


def test_precision_is_the_inputs_or_float32() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3)
    t = torch.full((2,), 0.4, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert score(x, t).dtype == torch.float64
    assert score.network.seen[0].dtype == score.network.seen[1].dtype == torch.float32
    assert score(x.bfloat16(), t).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert score(x.float(), t).dtype == torch.float32


def test_inactive_channels_are_hidden_saved_and_normal() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3)
    score.deactivate(torch.tensor([False, True, False]))
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    eps = score(x, t)
    assert not score.network.seen[0][:, 1].any()
    normal = VPSDE().normal_component(x, t)
    assert torch.equal(eps[:, 1], normal[:, 1])
    eps.square().sum().backward()
    assert score.mixing_logit.grad.flatten()[1] == 0 != score.mixing_logit.grad.flatten()[0]
    copy = MixedNormalScore(Toy(), VPSDE(), 3)
    copy.load_state_dict(score.state_dict())
    assert copy.channel_mask.flatten().tolist() == [1, 0, 1]
    assert torch.equal(copy(x, t), eps)


def test_deactivate_wants_a_bool_mask() -> None:
    score = MixedNormalScore(Toy(), VPSDE(), 3)
    with pytest.raises(ValueError, match="bool mask"):
        score.deactivate(torch.tensor([0.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="bool mask"):
        score.deactivate(torch.tensor([True]))


@all_sdes
def test_a_correction_is_the_same_function_of_another_network(sde: LinearSDE) -> None:
    """``(1 - a) normal + a network = normal + a (network - normal)``."""
    net = Toy()
    mixed = MixedNormalScore(net, sde, 3, mixing_init=-0.4)

    class Difference(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return net(x, t) - sde.normal_component(x, t)

    corrected = MixedNormalScore(Difference(), sde, 3, mixing_init=-0.4, predict="correction")
    x, t = torch.randn(5, 3, 4, 4), torch.rand(5) * 0.98 + 0.01
    torch.testing.assert_close(mixed(x, t), corrected(x, t), rtol=1e-4, atol=1e-5)
    # What the Normal-reference integrator has left of the Normal component is none of it.
    assert (corrected.non_normal == 0).all()
    torch.testing.assert_close(mixed.non_normal, mixed.mixing)


def test_a_correction_starts_at_the_normal_prior_whatever_the_mixing() -> None:
    sde = VPSDE()
    net = NCSNpp(channels=3, resolution=8, num_channels=32, num_scales=2, num_cells_per_scale=1)
    score = MixedNormalScore(net, sde, 3, mixing_init=2.0, predict="correction")
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 0.3)
    torch.testing.assert_close(score(x, t), sde.normal_component(x, t), rtol=0, atol=1e-4)


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="noise"):
        MixedNormalScore(nn.Identity(), VPSDE(), 3, predict="velocity")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mixed"):
        MixedNormalScore(nn.Identity(), VPSDE(), 3, mixed=False, predict="correction")
