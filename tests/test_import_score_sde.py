"""Score-SDE checkpoints as run folders: the model comes back; what does not fit is named."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from score_sde_files import published_state, write_checkpoint
from torch import Tensor

import lsgm
from lsgm.commands.run import run
from lsgm.commands.sample import SampleOptions
from lsgm.config.architecture import PriorNetworkConfig, SamplerConfig, ScoreModelConfig, SDEConfig
from lsgm.config.command_line import load_config, load_run_config, save_config
from lsgm.config.training import DataConfig, NCSNTrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.importers import score_sde_configs
from lsgm.importers.command import import_command
from lsgm.importers.formats import detect_format
from lsgm.importers.score_sde import import_score_sde
from lsgm.models.images import DataSGM, build_data_model
from lsgm.sampling.sampler import build_sampler
from lsgm.solvers import NormalReference

SPEC = DataSpec("folder", 3, 8, 0, binary=False, flip=True)
NETWORK = PriorNetworkConfig(
    num_channels=4, num_scales=2, channel_mult=(1, 2), num_cells_per_scale=1, embedding_dim=4,
    embedding_scale=999.0, attention_resolutions=(4,),
)  # fmt: skip
VP = NCSNTrainConfig(
    name="tiny-vp",
    kind="score_sde",
    data=DataConfig(name="folder", image_size=8, channels=3),
    score=ScoreModelConfig(
        ncsnpp=NETWORK, sde=SDEConfig(time_eps=1e-5), dequantise=False, data_std=0.0
    ),
    sampler=SamplerConfig(
        solver="discrete_pc", nfe=30, t_end=1e-3, predictor="euler_maruyama", corrector_steps=0
    ),
)
VE = replace(
    VP,
    name="tiny-ve",
    score=replace(
        VP.score,
        ncsnpp=replace(
            NETWORK, embedding_type="fourier", embedding_dim=8, embedding_width=16,
            embedding_scale=16.0, fir=True, progressive_input="residual",
        ),
        sde=SDEConfig(kind="vesde", sigma2_min=1e-4, sigma2_max=2500.0, time_eps=1e-5),
        condition="ln_sigma",
        data_range="unit",
        centre_input=True,
    ),
    sampler=replace(
        VP.sampler, nfe=24, t_end=1e-5, predictor="reverse_diffusion", corrector_steps=1
    ),
)  # fmt: skip
DDPM = replace(
    VP,
    name="tiny-ddpm",
    score=replace(
        VP.score,
        ncsnpp=replace(NETWORK, block="ddpm", rescale=False, norm_groups=2, embedding_scale=1.0),
        condition="index",
        discrete_levels=30,
    ),
    sampler=replace(VP.sampler, predictor="ancestral"),
)


def build(config: NCSNTrainConfig) -> DataSGM:
    torch.manual_seed(0)
    return build_data_model(config.kind, config.score, config.sampler, SPEC).eval()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A VP checkpoint and its configuration."""
    save_config(VP, tmp_path / "vp.yaml")
    return write_checkpoint(tmp_path / "checkpoint_8.pth", build(VP)), tmp_path / "vp.yaml"


@pytest.mark.parametrize("config", [VP, VE, DDPM], ids=lambda config: config.name)
@pytest.mark.parametrize("prefix", ["module.", ""])
@torch.no_grad()
def test_the_same_model_comes_back(config: NCSNTrainConfig, prefix: str, tmp_path: Path) -> None:
    """Bit by bit, its last weights and the average; from data-parallel training or not."""
    save_config(config, tmp_path / "c.yaml")
    model = build(config)
    file = write_checkpoint(tmp_path / "c.pth", model, prefix=prefix)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    imported = import_score_sde(file, tmp_path / "raw", "raw", tmp_path / "c.yaml")
    assert torch.equal(lsgm.load(tmp_path / "raw").score(x, t), model.score(x, t))
    assert imported.steps == 7 and imported.weights == "raw"
    import_score_sde(file, tmp_path / "ema", config=tmp_path / "c.yaml")
    for parameter in model.parameters():
        parameter.mul_(0.9)
    averaged = lsgm.load(tmp_path / "ema")
    assert torch.allclose(averaged.score(x, t), model.score(x, t), rtol=1e-6, atol=0)
    # the run is that of its configuration and samples as it says
    assert load_run_config(tmp_path / "ema") == replace(config, name="ema")
    options = SampleOptions(run=str(tmp_path / "ema"))
    chosen, own = build_sampler(averaged, options), averaged.default_sampler()
    assert chosen.method == own.method and torch.equal(chosen.times, own.times)
    assert averaged.sample(2).nfe == config.sampler.nfe
    # and with fewer evaluations as a model of ours
    few = build_sampler(averaged, replace(options, nfe=10))
    solver, times = few.method, few.times
    assert isinstance(solver, NormalReference) and solver.denoise
    assert solver.evaluations(len(times) - 1) == 10 and times[-1] == config.sampler.t_end
    named = build_sampler(averaged, replace(options, solver="discrete_pc"))
    assert named.method == own.method


def test_tensors_of_a_gpu_are_read_without_one(files: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = files
    there = tmp_path / "cuda.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(there, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in data
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(name, data)
    import_score_sde(there, tmp_path / "run", config=config)
    assert lsgm.load(tmp_path / "run").device.type == "cpu"


def test_what_else_a_file_holds_is_passed_over(files: tuple[Path, Path], tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "more.pth", build(VP), epoch=3, step=None)
    imported = import_score_sde(file, tmp_path / "run", config=files[1])
    assert imported.steps is None


def outcome(monkeypatch: Any, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: import_command([*map(str, arguments)]))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_command_line(
    files: tuple[Path, Path], monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    file, config = files
    for number, name in enumerate(("auto", "score-sde")):
        out = tmp_path / f"run{number}"
        code, text, errors = outcome(
            monkeypatch, capsys, name, file, "--out", out, "--config", config
        )
        assert (code, errors) == (0, "")
        assert text.startswith(f"{out}: score_sde of folder, ") and "averaged weights" in text
        assert f"configuration {config}" in text and "7 steps" in text
    assert detect_format(file) == "score-sde"


# Which configuration


@pytest.fixture
def shelf(monkeypatch: Any, tmp_path: Path) -> Callable[..., None]:
    """Puts configurations where those of published checkpoints are looked for."""

    def put(**configs: NCSNTrainConfig) -> None:
        for name, config in configs.items():
            save_config(config, tmp_path / f"{name}.yaml")
        files = {name: tmp_path / f"{name}.yaml" for name in configs}
        monkeypatch.setattr(score_sde_configs, "packaged_configs", lambda: files)
        monkeypatch.setattr(score_sde_configs, "PUBLISHED", {f"x/{n}": n for n in configs})

    return put


def test_found_by_shapes_and_noise(shelf: Any, tmp_path: Path) -> None:
    other = replace(VE, score=replace(VE.score, sde=replace(VE.score.sde, sigma2_max=900.0)))
    shelf(vp=VP, ve=VE, other=other, ddpm=DDPM)
    for name, config in (("vp", VP), ("ve", VE), ("ddpm", DDPM)):
        file = write_checkpoint(tmp_path / f"{name}.pth", build(config))
        said = import_score_sde(file, tmp_path / f"run_{name}").said
        assert said.startswith(f"configuration {name} by the shapes of the weights")


def test_found_by_the_name_of_the_folder(shelf: Any, tmp_path: Path) -> None:
    sub = replace(VP, score=replace(VP.score, sde=replace(VP.score.sde, kind="subvpsde")))
    shelf(vp=VP, sub=sub)
    file = write_checkpoint(tmp_path / "c.pth", build(VP))
    with pytest.raises(UserError, match=r"that of x/vp, x/sub; say which with --config"):
        import_score_sde(file, tmp_path / "run")
    (tmp_path / "x" / "sub").mkdir(parents=True)
    file = file.rename(tmp_path / "x" / "sub" / "c.pth")
    assert "by the name of the folder, x/sub" in import_score_sde(file, tmp_path / "run").said
    assert type(lsgm.load(tmp_path / "run").sde).__name__ == "SubVPSDE"
    named = import_score_sde(file, tmp_path / "named", config="x/vp")
    assert type(lsgm.load(tmp_path / "named").sde).__name__ == "VPSDE" and "x/vp" in named.said


def test_every_published_checkpoint_has_a_configuration() -> None:
    for name in score_sde_configs.PUBLISHED.values():
        config = load_config(NCSNTrainConfig, name)
        assert config.sampler.solver == "discrete_pc"
    names = list(score_sde_configs.PUBLISHED)
    assert len(names) == 16


# Files that are not right


def state_of(config: NCSNTrainConfig = VP) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"module.{k}", v) for k, v in published_state(build(config)).items())


def without(name: str) -> OrderedDict[str, Tensor]:
    state = state_of()
    del state[name]
    return state


def changed(name: str, value: Any) -> OrderedDict[str, Tensor]:
    return OrderedDict(state_of() | {name: value})


class _Executed:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


SHADOW = [0.9 * v for v in state_of().values()]
FIRST = "module.all_modules.0.weight"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, r"has no 'model'; its keys are optimizer, ema, step"),
    "no average": ({"ema": None}, r"no averaged weights \(ema\).*--weights raw"),
    "average without values": ({"ema": {"decay": 0.9}}, r"no averaged weights"),
    "averages too few": (
        {"ema": {"shadow_params": SHADOW[1:]}}, r"\d+ averages of \d+ trained.*--weights raw",
    ),
    "averages of another order": (
        {"ema": {"shadow_params": SHADOW[::-1]}}, r"the average of all_modules.0.weight is.*not",
    ),
    "weight missing": ({"model": without(FIRST), "ema": None}, r"hidden.weight is missing"),
    "module missing": (
        {"model": OrderedDict(list(state_of().items())[:-2]), "ema": None},
        r"all_modules.\d+, a Conv2d, is missing",
    ),
    "weight unknown": (
        {"model": changed("module.extra.weight", torch.ones(2)), "ema": None},
        r"extra.weight is unknown",
    ),
    "module unknown": (
        {"model": changed("module.all_modules.99.weight", torch.ones(2)), "ema": None},
        r"all_modules.99.weight is unknown",
    ),
    "shape": (
        {"model": changed(FIRST, torch.ones(2, 3)), "ema": None}, r"is 2 x 3, not 16 x 4",
    ),
    "prefix of some": (
        {"model": changed("odd.weight", torch.ones(2)), "ema": None},
        r"put together from two files",
    ),
    "not a tensor": (
        {"model": changed(FIRST, "text"), "ema": None}, r"all_modules.0.weight is no tensor",
    ),
    "not finite": (
        {"model": changed(FIRST, torch.full((16, 4), torch.nan)), "ema": None},
        r"1 of its tensors hold NaN or infinity.*earlier checkpoint",
    ),
    "another network": (
        {"model": state_of(DDPM), "ema": None}, r"does not fit tiny-vp",
    ),
    "weights of something else": (
        {"model": OrderedDict({"layer.weight": torch.ones(2)})}, r"no network of score-SDE",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_wrong_parts_are_one_line(
    kind: str, files: tuple[Path, Path], monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    parts, message = BAD[kind]
    file, out = write_checkpoint(tmp_path / "bad.pth", build(VP), **parts), tmp_path / "run"
    raw = [] if "average" in kind else ["--weights", "raw"]
    arguments = ["score-sde", file, "--out", out, "--config", files[1], *raw]
    code, text, errors = outcome(monkeypatch, capsys, *arguments)
    assert (code, text) == (2, "") and not out.exists()
    assert errors.startswith("error: checkpoint ") and errors.count("\n") == 1
    assert re.search(message, errors), errors


@pytest.mark.parametrize(
    "kind", ["truncated", "text", "missing", "folder", "tensor", "list", "code", "lsgm"]
)
def test_wrong_files_are_one_line(
    kind: str, files: tuple[Path, Path], monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    file, out, trace = tmp_path / "wrong.pth", tmp_path / "run", tmp_path / "trace"
    if kind == "truncated":
        file.write_bytes(files[0].read_bytes()[:20_000])
    elif kind == "text":
        file.write_text("name: tiny\n")
    elif kind == "folder":
        file.mkdir()
    elif kind in ("tensor", "list"):
        torch.save(torch.zeros(3) if kind == "tensor" else [torch.zeros(3), {}], file)
    elif kind == "code":
        torch.save({"model": _Executed(trace)}, file)
    elif kind == "lsgm":
        torch.save({"args": {}, "vae_state_dict": {}}, file)
    for name in ("score-sde", "auto"):
        if (kind, name) == ("lsgm", "auto"):
            assert detect_format(file) == "official-lsgm"
            continue
        code, text, errors = outcome(
            monkeypatch, capsys, name, file, "--out", out, "--config", files[1]
        )
        assert (code, text) == (2, "")
        assert errors.startswith(f"error: checkpoint {file}: ") and errors.count("\n") == 1
    assert not out.exists() and not trace.exists()


def test_wrong_configurations_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    ve = write_checkpoint(tmp_path / "ve.pth", build(VE))
    other = replace(VE, score=replace(VE.score, sde=replace(VE.score.sde, sigma2_max=900.0)))
    classifier = replace(VP, kind="classifier")
    sizeless = replace(VP, data=DataConfig(name="folder"))
    for name, config in (("o", other), ("c", classifier), ("s", sizeless)):
        save_config(config, tmp_path / f"{name}.yaml")
    for file, config, message in (
        (ve, "o.yaml", "noise goes from 50 to 0.01, that of the configuration from 30 to 0.01"),
        (files[0], "c.yaml", "is of a classifier"),
        (files[0], "s.yaml", "image_size and channels have to be known"),
        (files[0], "none.yaml", "no such configuration file"),
        (ve, "vp.yaml", "does not fit tiny-vp"),
    ):
        with pytest.raises(UserError, match=message):
            import_score_sde(file, tmp_path / "run", config=tmp_path / config)
    with pytest.raises(UserError, match="a ncsnpp network of .* no configuration of ours has"):
        import_score_sde(files[0], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    import_score_sde(files[0], tmp_path / "run", config=files[1])
    with pytest.raises(UserError, match="already holds a run"):
        import_score_sde(files[0], tmp_path / "run", config=files[1])


MEASURE = """
import resource, sys, torch
from lsgm.importers.command import import_command
from lsgm.importers import formats
torch.nn.Linear(2, 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_command(sys.argv[1:])
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_largest_import_needs_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    """1024 x 1024 pixels; the file also holds the last weights and the optimizer's moments. The
    peak is that beyond what the imports take.
    """
    name = "ve/ffhq_1024_ncsnpp_continuous"
    config = load_config(NCSNTrainConfig, score_sde_configs.PUBLISHED[name])
    spec = DataSpec("folder", 3, 1024, 0, binary=False, flip=True)
    model = build_data_model(config.kind, config.score, config.sampler, spec)
    moments = [v.clone() for v in published_state(model).values()]
    optimizer = {"state": {i: {"exp_avg": v} for i, v in enumerate(moments)}}
    checkpoint = write_checkpoint(tmp_path / "c.pth", model, optimizer=optimizer)
    weights = 4 * sum(v.numel() for v in moments)
    del model, moments, optimizer
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, "score-sde", checkpoint, "--out", tmp_path / "run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "105,785,880 parameters" in result.stdout and name.split("/")[0] in result.stdout
    before, peak = map(int, result.stdout.split()[-2:])
    assert (peak - before) * 1024 < 1.5 * weights
