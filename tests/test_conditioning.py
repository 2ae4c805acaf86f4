"""Inpainting, colourisation and guidance against exact conditional laws."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import MixtureOracle

from lsgm.conditioning import (
    ClassifierGuidance,
    ProjectionInpainting,
    channel_projector,
    classifier_free,
    colour_basis,
    grey_projector,
    mask_projector,
)
from lsgm.sde import VESDE, VPSDE
from lsgm.solvers import SOLVERS, make_grid, make_solver

SDE = VPSDE()
T_END = 0.05
OPTIONS = {"langevin": {"steps_per_level": 3, "denoise": True}}


class CorrelatedGaussian:
    """Data N(mean, covariance) over `shape`, with the exact noise prediction and conditionals."""

    def __init__(self, sde, mean, covariance, shape):
        self.sde, self.mean, self.covariance, self.shape = sde, mean, covariance, shape
        self.values, self.vectors = torch.linalg.eigh(covariance)

    def eps(self, x_t, t):
        x, t = x_t.double().flatten(1), t.double()
        m, var = self.sde.mean_coef(t)[:, None], self.sde.var(t)[:, None]
        along = (x - m * self.mean) @ self.vectors / (m**2 * self.values + var)
        return (var.sqrt() * along @ self.vectors.T).reshape(x_t.shape).to(x_t.dtype)

    def conditional(self, rows, known, t, noisy=False):
        """Basis (D - K, D) of the orthogonal complement of the orthonormal rows (K, D), and the
        mean and covariance of `z_t` in it given that `rows z_0 = known`, or, if noisy, given that
        `rows z_t = m known`.
        """
        time = torch.tensor([t], dtype=torch.float64)
        m, var = self.sde.mean_coef(time), self.sde.var(time)
        complement = torch.linalg.svd(rows)[2][len(rows) :]
        given = rows @ self.covariance @ rows.T
        if noisy:
            given = given + var / m**2 * torch.eye(len(rows))
        cross = complement @ self.covariance @ rows.T
        gain = cross @ torch.linalg.inv(given)
        mean = complement @ self.mean + gain @ (known - rows @ self.mean)
        covariance = complement @ self.covariance @ complement.T - gain @ cross.T
        return complement, m * mean, m**2 * covariance + var * torch.eye(len(complement)).double()


def correlated(shape, seed=0):
    dims = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    covariance = 0.5 * a @ a.T / dims + 0.2 * torch.eye(dims)
    mean = torch.randn(dims, generator=generator, dtype=torch.float64)
    return CorrelatedGaussian(SDE, mean, covariance, shape)


def errors(x, mean, covariance):
    """Distance of sample moments to exact ones, in units of the standard deviation."""
    inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
    white = (x - mean) @ inverse.T
    cov = torch.cov(white.T).reshape(len(mean), len(mean))
    return white.mean(0).norm().item(), (cov - torch.eye(len(mean))).norm().item()


def inpaint(oracle, projector, known, solver, times, num):
    rng = torch.Generator().manual_seed(1)
    start = SDE.prior_sample((num, *oracle.shape), rng, dtype=torch.float64)
    hook = ProjectionInpainting(SDE, known.expand(num, *oracle.shape), projector)
    x = solver.solve(SDE, oracle.eps, start, times, rng, [hook]).x
    torch.testing.assert_close(projector(x), projector(known.expand_as(x)), atol=1e-12, rtol=0)
    return x


CASES = {
    "pixels": (
        (1, 2, 2),
        mask_projector(torch.tensor([[[True, False], [False, True]]])),
        torch.eye(4, dtype=torch.float64)[[0, 3]],
    ),
    "grey": ((3,), grey_projector(), torch.full((1, 3), 1 / math.sqrt(3), dtype=torch.float64)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["predictor_corrector", "langevin"])
def test_inpainting_converges_to_the_conditional(case, name):
    """Replacement alone is biased. With Langevin steps the unknown part comes to rest against the
    known one at the last noise level: its law given the known part *at that level*, whose
    difference from the exact conditional law falls with that noise.
    """
    shape, projector, rows = CASES[case]
    oracle, num, t_end = correlated(shape), 2000, 0.2
    known = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    value = rows @ known.flatten()
    complement, *exact = oracle.conditional(rows, value, t_end)
    _, *limit = oracle.conditional(rows, value, t_end, noisy=True)
    times = make_grid("time", SDE, 8, t_end)
    found = []
    for steps in (0, 50):
        if name == "langevin":
            solver = make_solver(name, steps_per_level=1 + steps, step_ratio=0.2)
        else:
            solver = make_solver(
                name, predictor="ancestral", corrector_steps=steps, norm="expected", snr=0.35
            )
        x = inpaint(oracle, projector, known, solver, times, num).flatten(1) @ complement.T
        found.append([errors(x, *law) for law in (limit, exact)])
    print(case, name, found)
    (coarse, coarse_exact), (fine, fine_exact) = found
    noise = 4 / math.sqrt(num)  # of the mean; 1.5 times that of a covariance of few variables
    assert fine[0] < noise + 0.05
    assert fine[1] < 1.5 * noise + 0.1
    assert max(fine) < 0.6 * max(coarse)
    assert max(fine_exact) < max(coarse_exact)


def test_the_limit_of_inpainting_is_the_conditional():
    """What the test above compares with tends to the exact conditional law as the noise does."""
    shape, _, rows = CASES["pixels"]
    oracle, value = correlated(shape), torch.tensor([0.3, -1.0]).double()
    distances = []
    for t in (0.1, 0.03, 0.01):
        _, *exact = oracle.conditional(rows, value, t)
        _, *limit = oracle.conditional(rows, value, t, noisy=True)
        distances.append(max((a - b).norm().item() for a, b in zip(exact, limit, strict=True)))
    variances = SDE.var(torch.tensor([0.1, 0.03, 0.01]).double())
    assert distances[2] < 0.02
    slope = math.log(distances[1] / distances[2]) / math.log(variances[1] / variances[2])
    assert abs(slope - 1) < 0.1


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_known_pixels_end_exactly(name):
    """Bit by bit, in float32, with every solver; the others are not the known image's."""
    oracle, shape = correlated((1, 2, 2)), (5, 1, 2, 2)
    rng = torch.Generator().manual_seed(0)
    known, x = (torch.randn(shape, generator=rng) for _ in range(2))
    mask = torch.rand(shape, generator=rng) < 0.5
    hook = ProjectionInpainting(SDE, known, mask_projector(mask))
    solver = make_solver(name, **OPTIONS.get(name, {}))
    t_end = 0.0 if name == "ddpm" else T_END  # it goes down to the data
    end = solver.solve(SDE, oracle.eps, x, make_grid("time", SDE, 6, t_end), rng, [hook]).x
    assert torch.equal(end[mask], known[mask])
    assert (end[~mask] != known[~mask]).all()


def test_known_part_follows_the_kernel():
    """Before the end the known part has the kernel's law, and the rest is left alone."""
    num, t = 20000, 0.3
    known = torch.tensor([1.0, -2.0, 0.5]).double().expand(num, 3)
    x = torch.randn(num, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hook = ProjectionInpainting(SDE, known, grey_projector())
    time = torch.full((num,), t, dtype=torch.float64)
    y = hook.project(x, time, torch.Generator().manual_seed(1))
    torch.testing.assert_close(y - grey_projector()(y), x - grey_projector()(x), atol=1e-12, rtol=0)
    grey = y.mean(1) * math.sqrt(3)
    m, sigma = SDE.mean_coef(time[:1]).item(), SDE.var(time[:1]).sqrt().item()
    assert abs(grey.mean() - m * (-0.5) / math.sqrt(3)) < 4 * sigma / math.sqrt(num)
    assert abs(grey.std() / sigma - 1) < 4 / math.sqrt(2 * num)


def test_projectors_are_orthogonal():
    x, y = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    basis = colour_basis()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double())
    torch.testing.assert_close(basis[0], torch.full((3,), 1 / math.sqrt(3)).double())
    torch.testing.assert_close(channel_projector(basis[:1])(x), grey_projector()(x))
    mask = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    for projector in (
        mask_projector(mask), grey_projector(), channel_projector(basis[:2])
    ):  # fmt: skip
        torch.testing.assert_close(projector(projector(x)), projector(x))
        torch.testing.assert_close((projector(x) * y).sum(), (x * projector(y)).sum())
    with pytest.raises(ValueError, match="orthonormal"):
        channel_projector(torch.ones(1, 3))
    with pytest.raises(ValueError, match="bool"):
        mask_projector(torch.ones(2, 2))


class TwoComponents:
    """A mixture of two Gaussians with its exact noise-conditional classifier."""

    def __init__(self, sde, std=0.5):
        self.sde, means = sde, torch.tensor([[1.2, 0.4], [-0.9, 0.3]])
        self.both = MixtureOracle(sde, means, std)
        self.single = [MixtureOracle(sde, means[i : i + 1], std) for i in range(2)]

    def log_prob(self, label):
        def log_prob(x, t):
            _, _, components = self.both._components(x.double(), t.double())
            return components.log_softmax(1)[:, label]

        return log_prob


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize("label", [0, 1])
def test_exact_classifier_gives_the_component_s_score(sde, label):
    model = TwoComponents(sde)
    rng = torch.Generator().manual_seed(0)
    t = torch.rand(200, generator=rng, dtype=torch.float64) * 0.98 + 0.02
    x = 2 * torch.randn(200, 2, generator=rng, dtype=torch.float64)
    guided = ClassifierGuidance(sde, model.log_prob(label)).adjust_eps(model.both.eps(x, t), x, t)
    torch.testing.assert_close(guided, model.single[label].eps(x, t), atol=1e-10, rtol=1e-10)
    twice = ClassifierGuidance(sde, model.log_prob(label), 2.0).adjust_eps(
        model.both.eps(x, t), x, t
    )
    expected = 2 * model.single[label].eps(x, t) - model.both.eps(x, t)
    torch.testing.assert_close(twice, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["dpmpp_2m", "ancestral"])
def test_guided_samples_are_of_the_component(name):
    model, num, label = TwoComponents(SDE), 4000, 1
    rng = torch.Generator().manual_seed(2)
    start = SDE.prior_sample((num, 2), rng, dtype=torch.float64)
    times = make_grid("log_snr", SDE, 60, T_END)
    hook = ClassifierGuidance(SDE, model.log_prob(label))
    x = make_solver(name).solve(SDE, model.both.eps, start, times, rng, [hook]).x
    assert not x.requires_grad
    time = torch.tensor([T_END], dtype=torch.float64)
    m, var = SDE.mean_coef(time), SDE.var(time)
    total = m**2 * 0.25 + var
    off_mean, off_cov = errors(
        x, m * model.both.means[label], total * torch.eye(2, dtype=torch.float64)
    )
    assert off_mean < 4 * math.sqrt(2 / num) + 0.01
    assert off_cov < 4 * math.sqrt(6 / num) + 0.03


def test_classifier_free_guidance_extrapolates():
    model, calls = TwoComponents(SDE), []

    def network(x, t, labels):
        calls.append(labels)
        if labels is None:
            return model.both.eps(x, t)
        each = torch.stack([single.eps(x, t) for single in model.single])
        return each[labels, torch.arange(len(x))]

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.full((6,), 0.4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    conditional, plain = network(x, t, labels), network(x, t, None)
    calls.clear()
    for scale, expected, evaluations in (
        (0, plain, 1), (1, conditional, 1), (3.0, 3 * conditional - 2 * plain, 2)
    ):  # fmt: skip
        torch.testing.assert_close(classifier_free(network, labels, scale)(x, t), expected)
        assert len(calls) == evaluations
        calls.clear()
    # The exact classifier's guidance at the same scale is the same prediction.
    for label in (0, 1):
        hook = ClassifierGuidance(SDE, model.log_prob(label), 3.0)
        same = labels == label
        torch.testing.assert_close(
            classifier_free(network, labels, 3.0)(x, t)[same],
            hook.adjust_eps(model.both.eps(x, t), x, t)[same],
        )
