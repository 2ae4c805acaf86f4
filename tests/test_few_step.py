"""The few-step benchmark: its mixture, the adapters of diffusers' schedulers, its comparison."""

from __future__ import annotations

import json
import math

import pytest
import torch
from oracles import MixtureOracle

from lsgm.benchmark.few_step import FewStepOptions, measure
from lsgm.benchmark.few_step_cases import RingMixture, energy_distance, mixture_case, run_case
from lsgm.benchmark.few_step_report import comparison, write_report
from lsgm.benchmark.few_step_runner import Bench
from lsgm.benchmark.reference_samplers import METHODS, ReferenceSampler, reference_samplers
from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.config.training import DataConfig
from lsgm.data import build_datasets
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.release import save
from lsgm.sde import VPSDE, GeometricVPSDE
from lsgm.solvers import make_grid, make_solver

SDES = [VPSDE(), VPSDE(sigma2_0=1e-3), GeometricVPSDE()]
T_END = 1e-3


def noise(num=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 2, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("sde", SDES)
def test_mixture_is_the_oracle(sde):
    mixture, oracle = RingMixture(sde), MixtureOracle.ring(sde)
    t = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1e-3
    x = 2 * noise()
    torch.testing.assert_close(mixture.eps(x, t.clamp(max=1)), oracle.eps(x, t.clamp(max=1)))
    draws = mixture.sample(4000, 1e-3, torch.Generator().manual_seed(0))
    assert draws.var(0) == pytest.approx(torch.ones(2), abs=5 * math.sqrt(2 / 4000))


def test_energy_distance():
    a, b = torch.randn(2, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = 2 * b[:30]

    def mean(p, q, pairs):
        return sum((p[i] - q[j]).norm().item() for i, j in pairs) / len(pairs)

    def distinct(n):
        return [(i, j) for i in range(n) for j in range(n) if i != j]

    across = [(i, j) for i in range(40) for j in range(30)]
    expected = 2 * mean(a, b, across) - mean(a, a, distinct(40)) - mean(b, b, distinct(30))
    assert energy_distance(a, b) == pytest.approx(expected, rel=1e-12)


class TestAdapters:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("diffusers")

    def test_ddim_scheduler_is_our_ddim(self):
        """Its trailing grid: every 100th of a thousand times, then the first."""
        mixture, x = RingMixture(SDES[0]), noise()
        sampler = ReferenceSampler("ddim", "trailing")
        theirs = sampler.solve(mixture.sde, mixture.eps, x, 10, T_END)
        table = torch.linspace(T_END, 1, 1000, dtype=torch.float64)
        times = torch.cat([table[torch.arange(999, 0, -100)], table[:1]])
        ours = make_solver("ddim").solve(mixture.sde, mixture.eps, x, times)
        assert theirs.nfe == ours.nfe == 10
        assert theirs.t_end == T_END
        torch.testing.assert_close(theirs.x, ours.x, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sde", SDES)
    @pytest.mark.parametrize(
        ("sampler", "name", "options"),
        [
            (ReferenceSampler("ddim", "karras"), "ddim", {}),
            (
                ReferenceSampler("dpmpp_2m", options={"lower_order_final": False}),
                "dpmpp_2m",
                {},
            ),
            (
                ReferenceSampler("unipc", options={"solver_order": 2, "lower_order_final": False}),
                "unipc",
                {"order": 3},
            ),
        ],
    )
    def test_same_method_on_our_times(self, sde, sampler, name, options):
        """Also where theirs must be told another scale of the state than sqrt(m^2 + sigma^2) =
        1.
        """
        mixture, x = RingMixture(sde), noise()
        times = make_grid("sqrt_time", sde, 6, T_END)
        theirs = sampler.solve(sde, mixture.eps, x, 6, T_END, times=times)
        ours = make_solver(name, **options).solve(sde, mixture.eps, x, times)
        assert theirs.t_end == T_END
        torch.testing.assert_close(theirs.x, ours.x, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_every_sampler_runs_and_calls_where_it_says(self, method):
        """Calls of the network: as many as asked for, at decreasing times in [t_end, 1]."""
        mixture = RingMixture(SDES[0])
        samplers = list(reference_samplers(method, thorough=False))
        assert {s.grid for s in samplers} >= {"linspace", "leading", "trailing", "karras", "beta"}
        assert len(set(map(str, reference_samplers(method)))) > len(samplers)
        for sampler in samplers:
            asked = []

            def eps(x, t, asked=asked):
                asked.append(t[0].item())
                return mixture.eps(x, t)

            solution = sampler.solve(mixture.sde, eps, noise(4), 6, T_END)
            assert len(asked) == solution.nfe == 6, sampler.name
            assert all(a > b for a, b in zip(asked, asked[1:], strict=False)), sampler.name
            assert T_END - 1e-6 <= min(asked) <= max(asked) <= 1, sampler.name

    def test_ddim_scheduler_takes_no_times(self):
        with pytest.raises(ValueError, match="no times"):
            ReferenceSampler("ddim").solve(
                SDES[0], RingMixture(SDES[0]).eps, noise(4), 2, T_END, torch.tensor([1.0, 0.5, 0.1])
            )

    def test_a_run_is_measured_in_latents_and_pixels(self, tmp_path):
        """Untrained; the pixel distance is that of the images the decoder makes of the states."""
        torch.manual_seed(0)
        config = VAEConfig(
            num_channels_enc=8, num_channels_dec=8, channel_mult=(1, 1, 1),
            num_preprocess_cells=1, num_postprocess_cells=1, num_latent_scales=2,
            num_latent_per_group=2,
        )  # fmt: skip
        network = PriorNetworkConfig(
            num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8
        )
        prior, data = PriorConfig(network=network), DataConfig("digits")
        spec = build_datasets(data).spec
        vae = build_vae(config, spec)
        save(LSGM(vae, build_prior(prior, vae), spec, config, prior), tmp_path, data)
        case = run_case(tmp_path, 3, 2, 0.01, "none", torch.device("cpu"))
        assert not torch.equal(case.start[:2], case.pilots)
        bench = Bench(case, 1e-6)
        exact = bench.reference(0.01)
        assert bench.rms(exact, 0.01) == bench.pixel_rms(exact) == 0
        moved = exact + 0.1
        distance = 0.1 * math.sqrt(math.prod(case.start.shape[1:]))
        assert bench.rms(moved, 0.01) == pytest.approx(distance, rel=1e-9)
        images = [case.pixels(x).double() for x in (moved, exact)]
        expected = (images[0] - images[1]).square().mean().sqrt().item()
        assert bench.pixel_rms(moved) == pytest.approx(expected, rel=1e-6)
        assert bench.pixel_rms(moved) > 0
        train = build_datasets(data).train
        train = train.batch(torch.arange(len(train)))
        pairs = torch.cdist(images[1].flatten(1), train.double().flatten(1))
        near = pairs.min(1).values.mean().item()
        assert bench.quality(exact)["nearest training image"] == pytest.approx(near, rel=1e-6)
        x, calls = bench.ours(make_solver("normal_reference_pc"), torch.tensor([1.0, 0.3, 0.01]))
        assert calls == 2
        assert 0 < bench.rms(x, 0.01) < 1
        plain = build_vae(config, spec)
        (tmp_path / "vae").mkdir()
        save(VAEModel(plain, spec, config), tmp_path / "vae", data)
        with pytest.raises(UserError, match="no score-based prior"):
            run_case(tmp_path / "vae", 2, 2, 0.01, "none", torch.device("cpu"))

    def test_ours_is_nearer_than_the_best_of_theirs(self, tmp_path):
        """The claim at five evaluations, on fewer points; and the files of the report."""
        options = FewStepOptions(nfe=(5,), samples=64, pilots=16, tolerance=1e-7, thorough=False)
        result = measure(mixture_case(64, 16, T_END), options)
        (line,) = comparison(result)
        assert line["factor_default"] > 3
        assert line["factor_pilot"] > 8
        stochastic = [row for row in result.rows if row.family == "stochastic"]
        assert stochastic
        assert all(row.rms is None and row.quality for row in stochastic)
        for row in result.rows:
            assert row.nfe <= 5
        printed = write_report(result, tmp_path)
        assert "## Against diffusers" in printed
        names = {"report.md", "report.json", "error.png", "quality.png"}
        assert {path.name for path in tmp_path.iterdir()} == names
        saved = json.loads((tmp_path / "report.json").read_text())
        assert saved["comparison"][0]["default"] == line["default"]
        ablation = {(row.solver, row.grid): row.rms for row in result.ablation}
        default = ablation["default (corrector from 4 steps on)", "sqrt_time"]
        assert default == pytest.approx(line["default"], rel=1e-9)
        assert default < 0.5 * ablation["order 3", "sqrt_time"]


def test_without_diffusers_it_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install"):
        ReferenceSampler("deis").solve(SDES[0], RingMixture(SDES[0]).eps, noise(4), 2, T_END)


@pytest.mark.parametrize(
    "options", [{"nfe": ()}, {"nfe": (0,)}, {"samples": 1}, {"t_end": 1.0}, {"tolerance": 0.0}]
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        FewStepOptions(**options)
