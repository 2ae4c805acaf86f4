"""Codes of images, interpolation and resampling, against the closed forms of Gaussian models."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle
from state_model import StateModel

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.data.spec import DataSpec
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.sampling.codes import (
    Code,
    close_round_trip,
    decode,
    draw_code,
    encode,
    interpolate,
    resample_groups,
    slerp,
)
from lsgm.sde import VPSDE
from lsgm.solvers import make_grid, make_solver
from lsgm.solvers.sampler import Sampler

SDE = VPSDE()
T_END = 0.02
TIMES = make_grid("sqrt_time", SDE, 24, T_END)


class Images(StateModel):
    """A data-space model of Gaussian images (1, 2, 2), float64, with an exact prediction."""

    sde, state_shape = SDE, (1, 2, 2)

    def __init__(self):
        super().__init__()
        variance = torch.tensor([[[0.3, 0.1], [0.2, 0.5]]])
        self.oracle = GaussianOracle(SDE, torch.full((1, 2, 2), 0.2), variance)
        self.score = self.oracle.eps


class Groups(Images):
    """Two correlated groups of one channel in the state: cov [[1, 0.8], [0.8, 1]] s^2, and one
    finer group.
    """

    state_shape, state_groups = (2, 1, 1), 2
    covariance = 0.5 * torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)

    def __init__(self):
        StateModel.__init__(self)

    def score(self, x, t):
        x64, t = x.double().flatten(1), t.double()
        m, var = SDE.mean_coef(t)[0], SDE.var(t)[0]
        total = m**2 * self.covariance + var * torch.eye(2)
        return (var.sqrt() * x64 @ torch.linalg.inv(total)).reshape(x.shape).to(x)


def tiny_lsgm():
    torch.manual_seed(0)
    config = VAEConfig(
        num_channels_enc=8, num_channels_dec=8, channel_mult=(1, 1, 1), num_preprocess_cells=1,
        num_postprocess_cells=1, num_latent_scales=2, num_latent_per_group=2,
    )  # fmt: skip
    network = PriorNetworkConfig(
        num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8
    )
    prior = PriorConfig(network=network, mixing_init=0.0)
    spec = DataSpec("toy", 1, 16, 0, binary=True)
    vae = build_vae(config, spec)
    return LSGM(vae, build_prior(prior, vae), spec, config, prior).eval()


def test_the_code_is_the_exact_flow_of_the_image():
    model = Images()
    x = model.oracle.sample(5, T_END, torch.Generator().manual_seed(0))
    solver = make_solver("rk4")
    code = encode(model, x, solver, TIMES)
    exact = model.oracle.flow(x, T_END, 1.0)
    assert code.finer == ()
    torch.testing.assert_close(code.noise.double(), exact, atol=2e-4, rtol=0)
    torch.testing.assert_close(decode(model, code, solver, TIMES).double(), x, atol=2e-4, rtol=0)
    # Truncation: the flow of a Gaussian is affine, so half the noise is half the deviation.
    half = decode(model, code.scaled(0.5), solver, TIMES).double()
    torch.testing.assert_close(half, model.oracle.flow(0.5 * exact, 1.0, T_END), atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="deterministic"):
        encode(model, x, make_solver("ancestral"), TIMES)


def test_round_trip_through_a_latent_model():
    """Image -> posterior mean -> ODE noise -> latents -> image; only the solver's error is lost."""
    model = tiny_lsgm()
    rng = torch.Generator().manual_seed(0)
    x = 2.0 * (torch.rand(3, 1, 16, 16, generator=rng) < 0.5) - 1
    solver = make_solver("normal_reference_pc")
    code = encode(model, x, solver, TIMES)
    assert code.noise.shape == (3, *model.state_shape)
    assert len(code.finer) == 2
    posterior = model.vae.encode(x, noise=[torch.zeros(3, *s) for s in model.vae.latent_shapes])
    with torch.no_grad():
        direct = VAEModel.decode(model, posterior.eps)
    assert (code.noise - model.vae.concat_top(posterior.eps)).abs().max() > 0.01
    back = decode(model, code, solver, TIMES)
    torch.testing.assert_close(back, direct, atol=1e-3, rtol=0)
    drawn = encode(model, x, solver, TIMES, torch.Generator().manual_seed(1), mean=False)
    assert (drawn.noise - code.noise).abs().max() > 0.1


def test_a_drawn_code_is_a_sample():
    """Decoding a code with the sampler's noise gives the sampler's images."""
    model, solver = tiny_lsgm(), make_solver("ddim")
    sampler = Sampler(solver, times=TIMES)
    batch = model.draw(3, torch.Generator().manual_seed(2), sampler)
    code = draw_code(model, 3, torch.Generator().manual_seed(2))
    torch.testing.assert_close(decode(model, code, solver, TIMES), batch.images)
    assert torch.equal(batch.latents[1], code.finer[0])


def test_slerp_is_a_great_circle():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 2, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)

    def angle(u, v):
        cosine = torch.nn.functional.cosine_similarity(u.flatten(1), v.flatten(1))
        return cosine.clamp(-1, 1).acos()

    for w in (0.25, 0.7):
        c = slerp(a, b, w)
        torch.testing.assert_close(angle(a, c), w * angle(a, b))
        torch.testing.assert_close(angle(c, b), (1 - w) * angle(a, b))
        norms = (1 - w) * a.flatten(1).norm(dim=1) + w * b.flatten(1).norm(dim=1)
        torch.testing.assert_close(c.flatten(1).norm(dim=1), norms)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    near = a + 1e-9 * b
    torch.testing.assert_close(slerp(a, near, 0.5), 0.5 * (a + near), rtol=0, atol=1e-12)
    assert slerp(a, -a, 0.5).isfinite().all()
    # High-dimensional noise keeps its typical size, which linear interpolation halves.
    u, v = torch.randn(2, 1, 10000, generator=rng)
    assert slerp(u, v, 0.5).var() == pytest.approx(1, abs=0.05)
    assert (0.5 * (u + v)).var() == pytest.approx(0.5, abs=0.05)


def test_interpolation_goes_from_one_image_to_the_other():
    model, solver = Images(), make_solver("rk4")
    x = model.oracle.sample(2, T_END, torch.Generator().manual_seed(0))
    code = encode(model, x, solver, TIMES)
    a, b = Code(code.noise[:1], (torch.ones(1, 3),)), Code(code.noise[1:], (-torch.ones(1, 3),))
    path = interpolate(a, b, 5)
    assert len(path) == 5
    for end, image in ((path[0], x[:1]), (path[-1], x[1:])):
        torch.testing.assert_close(
            decode(model, end, solver, TIMES).double(), image, atol=2e-4, rtol=0
        )
    torch.testing.assert_close(path[0].finer[0], a.finer[0])
    with pytest.raises(ValueError, match="two steps"):
        interpolate(a, b, 1)


def test_resampled_groups_have_the_conditional_law():
    """Given one group, the other has mean 0.8 times it and variance 0.36 of its own: up to the
    noise of the last time, about which Langevin steps leave no doubt.
    """
    model, num, t_end = Groups(), 3000, 0.2
    known = torch.full((num, 2, 1, 1), 1.0, dtype=torch.float64)
    finer = [torch.full((num, 2), 7.0)] * 2
    solver = make_solver(
        "predictor_corrector", predictor="ancestral", corrector_steps=40, norm="expected", snr=0.35
    )
    sampler = Sampler(solver, times=make_grid("time", SDE, 5, t_end))
    rng = torch.Generator().manual_seed(0)
    state, fresh = resample_groups(model, known, finer, [0, 3], sampler, rng)
    assert torch.equal(state[:, 0], known[:, 0])
    assert torch.equal(fresh[1], finer[1])
    assert abs(fresh[0].mean()) < 4 / math.sqrt(2 * num)
    assert abs(fresh[0].var() - 1) < 4 * math.sqrt(2 / (2 * num))
    time = torch.tensor([t_end], dtype=torch.float64)
    m2, var = SDE.mean_coef(time).item() ** 2, SDE.var(time).item()
    # The law given the known group at the last noise level (see the tests of conditioning).
    gain = 0.4 / (0.5 + var / m2)
    exact_mean, exact_var = math.sqrt(m2) * gain, m2 * (0.5 - gain * 0.4) + var
    other = state[:, 1, 0, 0]
    assert abs(other.mean() - exact_mean) < 4 * math.sqrt(exact_var / num) + 0.05
    assert abs(other.var() / exact_var - 1) < 4 * math.sqrt(2 / num) + 0.08

    rng = torch.Generator().manual_seed(0)
    state, fresh = resample_groups(model, known, finer, range(4), sampler, rng)
    assert torch.equal(state, known)
    assert all(torch.equal(a, b) for a, b in zip(fresh, finer, strict=True))
    with pytest.raises(ValueError, match="no latent group 4: there are groups 0 to 3"):
        resample_groups(model, known, finer, [4], sampler, rng)


def test_resampling_every_group_is_sampling():
    model, solver = Groups(), make_solver("ancestral")
    num, rng = 3000, torch.Generator().manual_seed(1)
    known = torch.full((num, 2, 1, 1), 5.0, dtype=torch.float64)
    times = make_grid("log_snr", SDE, 60, 0.1)
    state, _ = resample_groups(model, known, [], [], Sampler(solver, times=times), rng)
    time = torch.tensor([0.1], dtype=torch.float64)
    exact = SDE.mean_coef(time) ** 2 * model.covariance + SDE.var(time) * torch.eye(2)
    found = torch.cov(state.flatten(1).T)
    assert (found - exact).abs().max() < 4 * exact.max() * math.sqrt(2 / num) + 0.03


def test_a_latent_model_keeps_its_groups():
    model, rng = tiny_lsgm(), torch.Generator().manual_seed(0)
    x = 2.0 * (torch.rand(2, 1, 16, 16, generator=rng) < 0.5) - 1
    with torch.no_grad():
        state, *finer = model.encode(x, mean=True)
    sampler = Sampler("ancestral", times=TIMES)
    new, fresh = resample_groups(model, state, finer, [1, 2], sampler, rng)
    assert torch.equal(new[:, 2:], state[:, 2:])
    assert (new[:, :2] != state[:, :2]).all()
    assert torch.equal(fresh[0], finer[0]) and not torch.equal(fresh[1], finer[1])


def test_the_round_trip_closes_to_the_order_of_the_solver():
    """Encoding takes the steps of decoding backwards: in float64 nothing but their error is left,
    which the flow of this model can neither grow nor hide.
    """
    model = Images()
    x = model.oracle.sample(5, T_END, torch.Generator().manual_seed(0))
    errors = []
    for steps in (24, 48):
        times = make_grid("sqrt_time", SDE, steps, T_END)
        closure = close_round_trip(model, x.double(), make_solver("heun"), times)
        assert torch.equal(closure.state, x.double())
        errors.append((closure.back - closure.state).abs().max().item())
    assert 2.5 < errors[0] / errors[1] < 12  # between orders 1.3 and 3.6
    adaptive = make_solver("dopri5", rtol=1e-6, atol=1e-6)
    closure = close_round_trip(model, x.double(), adaptive, TIMES)
    assert (closure.back - closure.state).abs().max() < 1e-4


def test_codes_are_cut_and_joined_by_images():
    rng = torch.Generator().manual_seed(0)
    code = Code(torch.randn(5, 1, 2, 2, generator=rng), (torch.randn(5, 3, generator=rng),))
    joined = Code.cat([code.rows(slice(0, 2)), code.rows(torch.tensor([2, 3, 4]))])
    assert len(joined) == 5 and torch.equal(joined.noise, code.noise)
    assert torch.equal(joined.finer[0], code.finer[0])
    assert Code.cat([Code(code.noise), Code(code.noise)]).finer == ()
