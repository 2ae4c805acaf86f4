from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from torch import Tensor, nn

from lsgm.divergence import HutchinsonDivergence
from lsgm.networks import NCSNpp
from lsgm.networks.ncsn import NCSN
from lsgm.noise_ladder import LadderTimes, NoiseLadder
from lsgm.objectives import denoising_score_matching
from lsgm.score_matching import ESTIMATORS, score_loss, sliced_error, sliced_objective
from lsgm.sde import VESDE, VPSDE, LinearSDE
from lsgm.tensors import sum_except_batch
from lsgm.times import UniformTimes, importance_times
from lsgm.weighting import LikelihoodWeighting, UnweightedWeighting
from vae.random import randn

LADDER = NoiseLadder(2.0, 0.2, 5)
SDES: list[LinearSDE] = [LADDER.sde(0.1), VPSDE(time_eps=0.1)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probes(x: Tensor, seed: int, num: int = 1, kind: str = "rademacher") -> Tensor:
    return HutchinsonDivergence(kind, num).probe(x, rng(seed))  # type: ignore[arg-type]


def within(sample: Tensor, expected: Tensor | float, sigmas: float = 4.5) -> None:
    """The mean of ``sample (N, ...)`` is ``expected`` within its standard error."""
    error = sample.std(0) / math.sqrt(len(sample))
    distance = (sample.mean(0) - expected).abs()
    assert (distance <= sigmas * error + 1e-12).all(), (distance / error).max()


def quadratic(x: Tensor, t: Tensor) -> Tensor:
    """A noise prediction that is no oracle's, with a non-trivial Jacobian."""
    return 0.4 * x.roll(1, -1) + 0.1 * x.square() + torch.sin(x + t[:, None])


def test_denoising_error_is_the_sigma2_weighted_score_error() -> None:
    """arXiv 1907.05600 eq. 5 and 6 with ``lambda = sigma^2``, term by term."""
    sde = LADDER.sde()
    x0, eps = torch.randn(20, 3, generator=rng()), torch.randn(20, 3, generator=rng(1))
    t = LADDER.times.float().repeat(4)
    x_t, error = denoising_score_matching(sde, quadratic, x0, t, eps)
    for i, sigma in enumerate(LADDER.sigmas.tolist()):
        rows = slice(i, None, 5)
        score = -quadratic(x_t[rows], t[rows]) / sigma
        eq5 = 0.5 * sum_except_batch((score + (x_t[rows] - x0[rows]) / sigma**2).square())
        torch.testing.assert_close(0.5 * error[rows].sum(1), sigma**2 * eq5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sde", SDES, ids=["ve", "vp"])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_sliced_and_denoising_errors_have_the_same_mean(
    sde: LinearSDE, reduced: bool, kind: str
) -> None:
    """For a network that is far from the score."""
    n = 40_000
    oracle = MixtureOracle.ring(sde)
    x0 = oracle.means[torch.randint(8, (n,), generator=rng(2))]
    x0 = x0 + oracle.std * torch.randn(n, 2, generator=rng(3), dtype=torch.float64)
    t = 0.1 + 0.9 * torch.rand(n, generator=rng(4), dtype=torch.float64)
    eps = torch.randn(n, 2, generator=rng(5), dtype=torch.float64)
    x_t, denoising = denoising_score_matching(sde, quadratic, x0, t, eps)
    sliced = sliced_error(sde, quadratic, x_t, t, probes(x0, 6, kind=kind), reduced=reduced)
    within(sliced - sum_except_batch(denoising), 0.0)


@pytest.mark.parametrize("reduced", [False, True])
def test_sliced_objective_is_the_score_error(reduced: bool) -> None:
    """Value and gradient: ``E ||s - score||^2 / 2 - E ||score||^2 / 2`` (theorem 1), on data
    without noise from a Gaussian, whose score is known.
    """
    n, mean, std = 40_000, torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.3])
    x = mean + std * torch.randn(n, 2, generator=rng())
    parameters = torch.tensor([[0.3, -0.2], [0.1, -0.5]], requires_grad=True)
    truth = -(x - mean) / std**2

    def score(y: Tensor) -> Tensor:
        return torch.tanh(y) @ parameters.T - 0.2 * y

    explicit = 0.5 * (score(x) - truth).square().sum(1) - 0.5 * truth.square().sum(1)
    sliced = sliced_objective(score, x, probes(x, 1), reduced=reduced)
    within((sliced - explicit).detach(), 0.0)

    blocks = [torch.autograd.grad(part.mean(), parameters, retain_graph=True)[0]
              for part in (sliced - explicit).chunk(100)]  # fmt: skip
    within(torch.stack(blocks), 0.0)


def test_reduced_variance() -> None:
    x = torch.randn(20_000, 6, generator=rng())

    def score(y: Tensor) -> Tensor:
        return -y

    plain, reduced = (
        sliced_objective(score, x, probes(x, 1), reduced=flag).detach() for flag in (False, True)
    )
    # Rademacher probes know a diagonal Jacobian exactly: SSM-VR is then explicit score matching
    torch.testing.assert_close(reduced, -6 + 0.5 * x.square().sum(1))
    assert plain.var() > 2 * reduced.var()
    many = sliced_objective(score, x, probes(x, 1, num=16), reduced=False).detach()
    assert (many - reduced).var() < (plain - reduced).var() / 12


def affine_fit(residual: Callable[[Tensor, Tensor], Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Minimise an objective that is quadratic in ``(A, b)`` by one Newton step from zero."""
    size = dim * dim + dim

    def unpack(theta: Tensor) -> tuple[Tensor, Tensor]:
        return theta[: dim * dim].view(dim, dim), theta[dim * dim :]

    def value(theta: Tensor) -> Tensor:
        return residual(*unpack(theta))

    zero = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(value(zero), zero, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, zero, retain_graph=True)[0] for g in gradient])
    return unpack(-torch.linalg.solve(hessian, gradient.detach()))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_affine_minimiser_is_the_gaussian_score(estimator: str) -> None:
    """At one noise level, over all affine functions, every estimator finds ``-eps / sigma``."""
    n, dim = 60_000, 2
    sde, t = VESDE(0.04, 4.0, 0.0), 0.6
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64)
    noise = torch.randn(n, dim, generator=rng(), dtype=torch.float64)
    x0 = mean + noise @ torch.linalg.cholesky(covariance).T
    times = torch.full((n,), t, dtype=torch.float64)
    eps = torch.randn(n, dim, generator=rng(1), dtype=torch.float64)
    x_t = sde.perturb(x0, times, eps)
    v = probes(x0, 2, num=4)

    def objective(a: Tensor, b: Tensor) -> Tensor:
        def network(x: Tensor, t: Tensor) -> Tensor:
            return x @ a.T + b

        if estimator == "dsm":
            return (network(x_t, times) - eps).square().sum(1).mean()
        return sliced_error(sde, network, x_t, times, v, reduced=estimator == "ssm_vr").mean()

    a, b = affine_fit(objective, dim)
    var = sde.var(torch.tensor(t, dtype=torch.float64))
    precision = torch.linalg.inv(covariance + var * torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(a, var.sqrt() * precision, rtol=0, atol=0.025)
    torch.testing.assert_close(b, -var.sqrt() * precision @ mean, rtol=0, atol=0.025)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("oracle_kind", ["gaussian", "mixture"])
def test_gradient_vanishes_at_the_true_score(estimator: str, oracle_kind: str) -> None:
    """Of every direction in which features could change the oracle's score."""
    n, sde = 40_000, LADDER.sde(0.1)
    if oracle_kind == "gaussian":
        oracle: GaussianOracle | MixtureOracle = GaussianOracle(
            sde, torch.tensor([0.5, -1.0]), torch.tensor([0.5, 1.5])
        )
    else:
        oracle = MixtureOracle.ring(sde)
    x0 = oracle.sample(n, 0.0, rng(7))  # smoothed by sigma_min: that is the data here
    theta = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    # data with the kernel of time 0 on top has variance var(t) more, so the oracle is asked later
    shift = sde.sigma2_0

    def network(x: Tensor, t: Tensor) -> Tensor:
        later = sde.inverse_var(sde.var(t) + shift)
        eps = oracle.eps(x, later) * (sde.var(t) / sde.var(later)).sqrt()[:, None]
        features = torch.stack([torch.ones_like(x), x, torch.sin(2 * x)], -1)
        return eps + torch.einsum("bdk,kd->bd", features, theta)

    t = 0.1 + 0.8 * torch.rand(n, generator=rng(8), dtype=torch.float64)
    eps = torch.randn(n, 2, generator=rng(9), dtype=torch.float64)
    x_t = sde.perturb(x0, t, eps)
    if estimator == "dsm":
        error = (network(x_t, t) - eps).square().sum(1)
    else:
        error = sliced_error(sde, network, x_t, t, probes(x0, 1), reduced=estimator == "ssm_vr")
    blocks = [
        torch.autograd.grad(part.mean(), theta, retain_graph=True)[0] for part in error.chunk(100)
    ]
    within(torch.stack(blocks), 0.0)


class Features(nn.Module):
    """Noise prediction that is linear in random Fourier features of ``x / sqrt(1 + sigma^2)`` and
    of ``ln sigma``.
    """

    def __init__(self, sde: LinearSDE, width: int = 256) -> None:
        super().__init__()
        self.sde = sde
        self.directions = torch.randn(3, width, generator=rng(1), dtype=torch.float64)
        self.directions[:2] *= 1.5
        self.phases = 2 * math.pi * torch.rand(width, generator=rng(2), dtype=torch.float64)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        var = self.sde.var(t)[:, None]
        inputs = torch.cat([x / (1 + var).sqrt(), 0.5 * var.log()], 1)
        waves = torch.cos(inputs @ self.directions + self.phases)
        return torch.cat([waves, inputs, torch.ones_like(var)], 1)


def test_least_squares_denoiser_finds_the_mixture_score() -> None:
    """Trained to the end in closed form on the ladder; against the oracle at every level."""
    sde = LADDER.sde()
    oracle = MixtureOracle.ring(VESDE(1e-8, 4.0, 0.0), components=3, std=0.5)
    n = 40_000
    x0 = oracle.sample(n, 0.0, rng())
    times = LadderTimes(LADDER).sample(n, rng(3), stratified=True).t
    eps = torch.randn(n, 2, generator=rng(4), dtype=torch.float64)
    model = Features(sde)
    phi = model.features(sde.perturb(x0, times, eps), times)
    ridge = 1e-3 * torch.eye(phi.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(phi.T @ phi + ridge, phi.T @ eps)
    for t, sigma in zip(LADDER.times, LADDER.sigmas, strict=True):
        x = oracle.sample(2000, 0.0, rng(5))
        x = x + sigma * torch.randn(2000, 2, generator=rng(6), dtype=torch.float64)
        exact = oracle.eps(x, oracle.sde.inverse_var(sigma**2))
        fitted = model.features(x, t.expand(2000)) @ weights
        assert ((fitted - exact).square().mean() / exact.square().mean()) < 0.08


@pytest.mark.parametrize("estimator", ["ssm", "ssm_vr"])
def test_sliced_training_finds_the_score(estimator: str) -> None:
    """A small network trained without ever seeing the noise predicts it."""
    torch.manual_seed(0)
    sde = VESDE(0.25, 0.26, 0.0)
    oracle = MixtureOracle.ring(VESDE(1e-8, 4.0, 0.0), components=2, std=0.6)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    generator = rng(1)
    for _ in range(200):
        loss = score_loss(
            sde, lambda x, t: net(x), oracle.sample(400, 0.0, generator).float(),
            weighting=UnweightedWeighting(), proposal=UniformTimes(0.0), estimator=estimator,
            num_projections=2, rng=generator,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
    x = oracle.sample(4000, 0.0, rng(2)) + 0.5 * randn((4000, 2), rng(3), device="cpu")
    exact = oracle.eps(x, oracle.sde.inverse_var(torch.tensor(0.25, dtype=torch.float64)).item())
    with torch.no_grad():
        error = (net(x.float()) - exact).square().mean() / exact.square().mean()
    assert error < 0.05


def test_loss_is_the_weighted_integral() -> None:
    """Uniform and importance-sampled times estimate the same likelihood-weighted integral, which
    for the oracle of N(0, I) is known: ``int w (1 - var / total_var) D dt``.
    """
    sde, weighting = VPSDE(time_eps=0.05), LikelihoodWeighting()
    t = torch.linspace(0.05, 1, 20_001, dtype=torch.float64)
    expected = 3 * torch.trapezoid(weighting(sde, t) * sde.one_minus_var(t), t).item()
    x0 = torch.randn(40_000, 3, generator=rng())
    for proposal in (UniformTimes(0.05), importance_times(sde, weighting)):
        for estimator in ESTIMATORS:
            out = score_loss(
                sde, sde.normal_component, x0, weighting=weighting, proposal=proposal,
                estimator=estimator, rng=rng(1),
            )  # fmt: skip
            weight = weighting(sde, out.times.t) * out.times.inverse_density
            within((weight * out.error).double(), expected)
            assert out.loss.item() == pytest.approx((weight * out.error).mean().item(), rel=1e-4)


def test_ncsn_objective_is_the_mean_over_levels() -> None:
    """A network that predicts zero has the error ``D`` at every level."""
    out = score_loss(
        LADDER.sde(), lambda x, t: 0 * x, torch.zeros(4000, 1, 4, 4),
        weighting=UnweightedWeighting(), proposal=LadderTimes(LADDER), rng=rng(),
    )  # fmt: skip
    within(out.error.double(), 16.0)
    assert set(out.times.t.tolist()) == set(LADDER.times.tolist())


@pytest.mark.parametrize("estimator", ["ssm", "ssm_vr"])
@pytest.mark.parametrize("kind", ["ncsn", "ncsnv2", "ncsnpp"])
def test_networks_can_be_differentiated_twice(estimator: str, kind: str) -> None:
    """Against the gradient by finite differences in one direction of the parameters."""
    torch.manual_seed(0)
    ladder = NoiseLadder(1.0, 0.5, 3)
    if kind == "ncsnpp":
        net: nn.Module = NCSNpp(1, 8, num_channels=8, embedding_dim=8, attention_resolutions=(8, 4))
        for p in net.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    else:
        net = NCSN(1, 8, ladder, num_channels=4, conditional=kind == "ncsn")
    net.double()
    x0 = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def loss() -> Tensor:
        return score_loss(
            ladder.sde(), net, x0, weighting=UnweightedWeighting(), proposal=LadderTimes(ladder),
            estimator=estimator, rng=rng(3),
        ).loss  # fmt: skip

    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    # ELU has a bend, so the objective has many: the difference must be too small to meet one
    for step in (1e-8, -2e-8):
        for p, d in zip(parameters, directions, strict=True):
            p.data.add_(step * d)
        values.append(loss().item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-8, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("reduced", [False, True])
def test_an_evaluation_without_gradients_gives_the_same(reduced: bool) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
    probes = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(1, 3, 4)
    value = sliced_objective(lambda x: -x.square(), x, probes, reduced=reduced)
    with torch.no_grad():
        again = sliced_objective(lambda x: -x.square(), x, probes, reduced=reduced)
    assert torch.equal(value, again)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown estimator 'esm'"):
        score_loss(
            LADDER.sde(), lambda x, t: x, torch.zeros(2, 1), weighting=UnweightedWeighting(),
            proposal=LadderTimes(LADDER), estimator="esm",
        )  # fmt: skip
