"""The configurations of the experiments of NCSN, NCSNv2 and score-SDE, built without memory.

Expected numbers: arXiv 1907.05600 appendix B, arXiv 2006.09011 appendix B, arXiv 2011.13456
appendix H and the released configurations, whose noise levels are for images in [0, 1].
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from lsgm.config.command_line import load_config
from lsgm.config.training import NCSNTrainConfig
from lsgm.data.spec import DataSpec
from lsgm.models import images as datasgm
from lsgm.models.images import DataSGM, build_data_model
from lsgm.networks import NCSNpp
from lsgm.networks.layers import AttentionBlock
from lsgm.noise_ladder import select_step
from lsgm.solvers import DiscretePredictorCorrector

CONFIGS = Path(__file__).parent.parent / "configs"
TRAINING_IMAGES = {
    "mnist": 60_000,
    "cifar10": 50_000,
    "celeba": 162_770,
    "celebahq256": 27_000,
    "celebahq1024": 27_000,
    "ffhq256": 70_000,
    "ffhq1024": 70_000,
    "lsun/score_ve_bedroom": 3_033_042,
    "lsun/score_ve_church": 126_227,
    "lsun/ncsnv2_bedroom": 3_033_042,
    "lsun/ncsnv2_church": 126_227,
    "lsun/ncsnv2_tower": 708_264,
}


def training_images(name: str) -> int:
    return TRAINING_IMAGES.get(name) or TRAINING_IMAGES[name.split("/")[0]]


@dataclass(frozen=True)
class Ladder:
    """Published NCSN: shape, parameters, ladder in [0, 1], steps a level, epsilon, iterations."""

    shape: tuple[int, int]
    parameters: int
    ladder: tuple[float, float, int]
    steps: int
    epsilon: float
    iterations: int
    lr: float
    ema: float
    batch: int = 128
    adam_eps: float = 1e-8


V1, V2 = (1.0, 0.01, 10), (100, 2e-5, 200_000, 1e-3, 0.0)
NCSN = {
    "mnist/ncsn": Ladder((1, 28), 7_638_657, V1, *V2),
    "cifar10/ncsn": Ladder((3, 32), 30_117_635, V1, *V2),
    "celeba/ncsn": Ladder((3, 32), 30_117_635, V1, *V2),
    "cifar10/ncsnv2": Ladder(
        (3, 32), 29_694_083, (50.0, 0.01, 232), 5, 6.2e-6, 300_000, 1e-4, 0.999
    ),
    "celeba/ncsnv2": Ladder(
        (3, 64), 29_694_083, (90.0, 0.01, 500), 5, 3.3e-6, 210_000, 1e-4, 0.999
    ),
    "lsun/ncsnv2_church": Ladder(
        (3, 96), 83_445_379, (140.0, 0.01, 788), 4, 4.9e-6, 200_000, 1e-4, 0.999
    ),
    "lsun/ncsnv2_bedroom": Ladder(
        (3, 128), 83_445_379, (190.0, 0.01, 1086), 3, 1.8e-6, 150_000, 1e-4, 0.999
    ),
    "lsun/ncsnv2_tower": Ladder(
        (3, 128), 83_445_379, (190.0, 0.01, 1086), 3, 1.8e-6, 150_000, 1e-4, 0.999
    ),
    "ffhq256/ncsnv2": Ladder(
        (3, 256), 94_132_611, (348.0, 0.01, 2311), 3, 9e-7, 80_000, 1e-4, 0.999, 32, 1e-3
    ),
}


@dataclass(frozen=True)
class ScoreSDE:
    """Published score-SDE model.

    ``parameters`` are those of the released checkpoints; the frozen frequencies count in them.
    ``predictor`` and ``snr`` (VE) are the published sampler's, ``levels`` those of discrete models.
    """

    shape: tuple[int, int]
    parameters: int
    widths: tuple[int, ...]
    blocks: int
    sde: str
    sigma_max: float | None
    pyramids: tuple[str, str]
    dropout: float
    batch: int
    iterations: int
    ema: float
    evaluations: int
    predictor: str = "reverse_diffusion"
    snr: float = 0.16
    levels: int | None = None
    ddpm: bool = False
    lr: float = 2e-4


W = (128, 256, 256, 256)
NONE, RESIDUAL, SKIP = ("none", "none"), ("none", "residual"), ("output_skip", "input_skip")
HIGH = (128, 128, *[256] * 5)
HUGE = (16, 32, 64, 128, 256, 512, 512, 512)


def ve(parameters: int, blocks: int, levels: int | None = None) -> ScoreSDE:
    steps = 950_000 if blocks == 8 else 1_300_000
    return ScoreSDE(
        (3, 32), parameters, W, blocks, "vesde", 50.0, RESIDUAL, 0.1, 128, steps, 0.999, 2000,
        levels=levels,
    )  # fmt: skip


def vp(
    parameters: int, blocks: int, sde: str = "vpsde", levels: int | None = None, ddpm: bool = False
) -> ScoreSDE:
    steps = 950_000 if blocks == 8 else 1_300_000
    predictor = "ancestral" if levels else "euler_maruyama"
    return ScoreSDE(
        (3, 32), parameters, W, blocks, sde, None, NONE, 0.1, 128, steps, 0.9999, 1000,
        predictor, levels=levels, ddpm=ddpm,
    )  # fmt: skip


def high(sigma_max: float) -> ScoreSDE:
    return ScoreSDE(
        (3, 256), 65_574_549, HIGH, 2, "vesde", sigma_max, SKIP, 0.0, 64, 2_400_000, 0.999, 4000,
        snr=0.075,
    )  # fmt: skip


HUGE_VE = ScoreSDE(
    (3, 1024), 105_785_896, HUGE, 1, "vesde", 1348.0, SKIP, 0.0, 8, 2_400_000, 0.9999, 4000,
    snr=0.15,
)  # fmt: skip
SCORE_SDE = {
    "cifar10/score_ve": ve(62_758_915, 4),
    "cifar10/score_ve_deep": ve(107_587_075, 8),
    "cifar10/score_ve_discrete": ve(62_693_251, 4, levels=1000),
    "cifar10/score_vp": vp(61_804_419, 4),
    "cifar10/score_vp_deep": vp(106_632_579, 8),
    "cifar10/score_vp_discrete": vp(61_804_419, 4, levels=1000),
    "cifar10/score_vp_ddpm": vp(35_218_947, 2, ddpm=True),
    "cifar10/score_vp_ddpm_discrete": vp(35_218_947, 2, levels=1000, ddpm=True),
    "cifar10/score_subvp": vp(61_804_419, 4, "subvpsde"),
    "cifar10/score_subvp_deep": vp(106_632_579, 8, "subvpsde"),
    "cifar10/score_subvp_ddpm": vp(35_218_947, 2, "subvpsde", ddpm=True),
    "celebahq256/score_ve": high(348.0),
    "ffhq256/score_ve": high(348.0),
    "lsun/score_ve_bedroom": high(378.0),
    "lsun/score_ve_church": high(380.0),
    "celebahq1024/score_ve": HUGE_VE,
    "ffhq1024/score_ve": HUGE_VE,
    "celeba/score_ve": ScoreSDE(
        (3, 64), 62_693_251, W, 4, "vesde", 90.0, RESIDUAL, 0.1, 128, 1_300_000, 0.999, 2000,
        snr=0.17, levels=1000,
    ),
    "celebahq256/score_vp_ddpm": ScoreSDE(
        (3, 256), 111_569_923, (128, 128, 256, 256, 512, 512), 2, "vpsde", None, NONE, 0.0, 64,
        2_400_000, 0.9999, 1000, "ancestral", levels=1000, ddpm=True, lr=2e-5,
    ),
}  # fmt: skip


@functools.cache
def build(name: str) -> tuple[NCSNTrainConfig, DataSGM]:
    config = load_config(NCSNTrainConfig, CONFIGS / f"{name}.yaml")
    channels, side = {**NCSN, **SCORE_SDE}[name].shape
    if config.data.name == "folder":
        assert (config.data.channels, config.data.image_size) == (channels, side)
    spec = DataSpec(config.data.name, channels, side, padding=0, binary=False)
    with torch.device("meta"):
        return config, build_data_model(config.kind, config.score, config.sampler, spec)


def count(model: torch.nn.Module) -> int:
    """With the Fourier frequencies, which are no parameters of ours."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(v.numel() for v in tensors) - sum(4 * 4 for m in model.modules() if is_filter(m))


def is_filter(module: torch.nn.Module) -> bool:
    return any(name == "kernel" for name, _ in module.named_buffers(recurse=False))


def check_training(
    name: str, batch: int, iterations: int, lr: float, ema: float, adam_eps: float = 1e-8
) -> None:
    config, _ = build(name)
    train, optim = config.train, config.optim
    steps = training_images(name) // batch
    assert (train.batch_size, train.max_steps) == (batch, iterations)
    assert 0 <= train.epochs * steps - iterations < steps
    assert (optim.optimizer, optim.lr, optim.lr_min, optim.eps) == ("adam", lr, lr, adam_eps)
    assert (optim.schedule, optim.weight_decay, optim.ema_decay) == ("constant", 0, ema)
    assert config.data.flip == (not name.startswith("mnist"))
    # Times and levels are drawn independently, and the average has a warm-up in score-SDE alone.
    assert not config.objective.stratified_times
    assert optim.ema_warmup == (config.kind == "score_sde") and optim.betas == (0.9, 0.999)
    assert train.release == "last"
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    keys = {field.name for field in dataclasses.fields(optim)} - {"impl"}
    assert keys == written["optim"].keys() and "stratified_times" in written["objective"]
    assert config.objective.estimator == "dsm" and config.objective.weighting == "unweighted"
    assert config.score.data_range == ("unit" if "score_ve" in name else "symmetric")
    # the scale of the published loss, which clipping and Adam's eps see: reduce_mean in the VP and
    # sub-VP models and in the one of 1024 pixels, half the sum elsewhere
    mean = "vp" in name or "1024" in name
    assert config.objective.reduction == ("mean" if mean else "half_sum")


@pytest.mark.parametrize("name", NCSN)
def test_ncsn(name: str) -> None:
    expected = NCSN[name]
    config, model = build(name)
    assert count(model) == expected.parameters
    sigma_max, sigma_min, levels = expected.ladder
    ladder = model.ladder
    assert ladder is not None
    assert (ladder.sigma_max, ladder.sigma_min) == (2 * sigma_max, 2 * sigma_min)
    assert ladder.num_levels == levels
    first = name.endswith("ncsn")
    assert model.score.conditional == first
    assert config.score.dequantise == first  # (255 x + u) / 256 in the first code only
    training = expected.iterations, expected.lr, expected.ema, expected.adam_eps
    check_training(name, expected.batch, *training)
    assert (config.optim.warmup_steps, config.optim.clip_norm) == (0, 0)
    chosen = model.defaults
    assert (chosen.solver, chosen.grid, chosen.t_end) == ("langevin", "ladder", 0.0)
    assert chosen.options["steps_per_level"] == expected.steps
    assert chosen.options["denoise"] == (not first)
    assert config.sampler.start == "uniform"
    ratio = 2 * expected.epsilon / sigma_min**2
    assert chosen.options["step_ratio"] == pytest.approx(ratio, rel=1e-9)
    if not first and name != "lsun/ncsnv2_church":  # whose published step has another origin
        assert select_step(ladder, expected.steps).step_ratio == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde(name: str) -> None:
    expected = SCORE_SDE[name]
    config, model = build(name)
    assert count(model) == expected.parameters
    network: Any = model.score.network
    assert isinstance(network, NCSNpp)
    widths = tuple(level.blocks[-1].conv_out.weight.shape[0] for level in network.down)
    assert widths == expected.widths
    assert all(len(level.blocks) == expected.blocks for level in network.down)
    sides = [network.resolution >> i for i in range(len(widths))]
    assert [bool(level.attentions) for level in network.down] == [s == 16 for s in sides]
    attends = 16 in sides
    blocks = sum(isinstance(m, AttentionBlock) for m in network.modules())
    assert blocks == (expected.blocks + 2 if attends else 1)
    options = config.score.ncsnpp
    assert (options.progressive, options.progressive_input) == expected.pyramids
    assert options.dropout == expected.dropout
    assert network.embedding.width == 4 * options.num_channels
    assert config.score.data_std == 0 and not config.score.dequantise
    sde = config.score.sde
    assert (sde.kind, sde.time_eps) == (expected.sde, 1e-5)
    if expected.sigma_max is None:
        assert (sde.beta_start, sde.beta_end) == (0.1, 20.0)
        assert not options.fir and not config.score.centre_input
    else:
        assert (sde.sigma2_min, sde.sigma2_max) == (0.01**2, expected.sigma_max**2)
        assert options.fir and config.score.centre_input
    # the time as the network is told it: a level, ln(sigma), or 999 t
    condition, embedding = config.score.condition, (options.embedding_type, options.embedding_scale)
    assert config.score.discrete_levels == expected.levels
    if expected.levels is not None:
        assert (condition, embedding) == ("index", ("positional", 1))
    elif expected.sigma_max is not None:
        assert (condition, embedding) == ("ln_sigma", ("fourier", 16))
    else:
        assert (condition, embedding) == ("time", ("positional", 999))
    twice = 2 if options.embedding_type == "fourier" else 1
    assert options.embedding_dim == twice * options.num_channels
    ddpm = (options.block, options.rescale, options.norm_groups) == ("ddpm", False, 32)
    assert ddpm == expected.ddpm
    check_training(name, expected.batch, expected.iterations, expected.lr, expected.ema)
    assert (config.optim.warmup_steps, config.optim.clip_norm) == (5000, 1)


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde_sampler(name: str) -> None:
    """The published number of times, at each one predictor (the last is the closing mean) and, VE,
    one corrector, whose norms are averaged over the batch.
    """
    _, model = build(name)
    expected = SCORE_SDE[name]
    sampler = model.default_sampler()
    solver, times = sampler.method, sampler.times
    assert isinstance(solver, DiscretePredictorCorrector) and solver.denoise
    assert (solver.predictor, solver.levels) == (expected.predictor, expected.levels)
    assert solver.evaluations(len(times) - 1) == expected.evaluations
    assert len(times) == expected.evaluations // (2 if expected.sigma_max else 1)
    assert times[-1] == (1e-5 if expected.sigma_max else 1e-3)
    assert times.diff().diff().abs().max() < 1e-12
    if expected.sigma_max:
        assert (solver.corrector_steps, solver.norm) == (1, "batch")
        assert solver.snr == expected.snr
    else:
        assert solver.corrector_steps == 0


@pytest.mark.parametrize(
    "name",
    [
        "mnist/ncsn", "celeba/ncsnv2", "lsun/ncsnv2_church", "ffhq256/ncsnv2",
        "cifar10/score_ve", "cifar10/score_vp", "celebahq256/score_ve", "celebahq1024/score_ve",
        "cifar10/score_vp_ddpm",
    ],
)  # fmt: skip
def test_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes through the whole of each kind of network, without computing."""
    config, model = build(name)
    # Fake tensors take no memory, and allow no rehearsal on the meta device.
    monkeypatch.setattr(datasgm, "build_within_memory", lambda build, what: build())
    with FakeTensorMode():
        real = build_data_model(config.kind, config.score, config.sampler, model.spec)
        x = torch.zeros(2, *model.state_shape)
        assert real.score(x, torch.rand(2)).shape == x.shape


def test_every_configuration_is_checked() -> None:
    found = {
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for folder in {name.split("/")[0] for name in TRAINING_IMAGES}
        for path in (CONFIGS / folder).glob("*.yaml")
        if path.stem.startswith(("ncsn", "score")) and "small" not in path.stem
    }
    assert found == {*NCSN, *SCORE_SDE}
