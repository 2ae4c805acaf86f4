"""Files of NCSN and NCSNv2: how the configuration is found, and what is said of bad ones."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import lsgm
from lsgm.commands.run import run
from lsgm.config.command_line import load_config, load_run_config
from lsgm.config.training import NCSNTrainConfig
from lsgm.importers.command import import_command
from lsgm.importers.ncsn_checkpoints import choose_config, read_ncsn
from lsgm.importers.ncsn_options import PUBLISHED
from lsgm.importers.score_runs import meta_model
from lsgm.networks.ncsn import NCSN
from lsgm.noise_ladder import NoiseLadder

NAMES = [
    (r"^conv_in", "begin_conv"),
    (r"^conv_out", "end_conv"),
    (r"^norm_out", "normalizer"),
    (r"\.norm_in\b", ".normalize1"),
    (r"\.norm_out\b", ".normalize2"),
    (r"\.conv_in\b", ".conv1"),
    (r"\.conv_out\b", ".conv2"),
    (r"\.fusion\.", ".msf."),
    (r"\.pooling\.", ".crp."),
    (r"\.inputs\.(\d)\.", r".adapt_convs.\1."),
    (r"\.output\.", ".output_convs."),
]


def published(network: NCSN) -> dict[str, Tensor]:
    """The weights of a network under published names, with the prefix of data-parallel training."""
    deepest = len(network.stages) == 6
    stages = ["1", "2", "3", "31", "4", "5"] if deepest else list("12345")
    steps = ["1", "2", "31", "3", "4", "5"] if deepest else list("12345")
    state = {}
    for name, value in network.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"res{stages[int(m[1])]}.", name)
        name = re.sub(r"^refine\.(\d)", lambda m: f"refine{steps[int(m[1])]}", name)
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if "adapt_convs" in name or "output_convs" in name:
            name = re.sub(
                r"\.(conv|norm)s\.(\d)",
                lambda m: f".{int(m[2]) // 2 + 1}_{int(m[2]) % 2 + 1}_{m[1]}",
                name,
            )
        stage = next((int(i) for i, s in enumerate(stages) if name.startswith(f"res{s}.0.")), 0)
        if stage and network.stages[stage].blocks[0].halves:
            name = re.sub(r"\.(conv2|shortcut)\.", r".\1.conv.", name)
        if not name.endswith("table.weight"):
            state[f"module.{name}"] = value
        elif network.conditional:
            state[f"module.{name.replace('table', 'embed')}"] = value
        else:
            parts = zip(("gamma", "alpha", "beta"), value[0].chunk(3), strict=True)
            state |= {f"module.{name.replace('table.weight', leaf)}": v for leaf, v in parts}
    return state


def network(conditional: bool, levels: int, width: int = 2, config: str = "cifar10/ncsn") -> NCSN:
    torch.manual_seed(0)
    sizes = load_config(NCSNTrainConfig, config).score.refinenet
    return NCSN(
        3,
        32,
        NoiseLadder(1.0, 0.01, levels),
        num_channels=width,
        channel_mult=sizes.channel_mult,
        dilations=sizes.dilations,
        conditional=conditional,
    )


OPTIONS: dict[str, Any] = {
    "data": {"dataset": "CIFAR10", "image_size": 32, "channels": 3, "random_flip": True},
    "model": {"ngf": 2, "num_classes": 10, "sigma_begin": 1, "sigma_end": 0.01},
    "optim": {"lr": 0.002, "eps": 1e-6},
    "training": {"batch_size": 64, "n_iters": 1001},
}
SECOND: dict[str, Any] = OPTIONS | {
    "model": {"ngf": 2, "num_classes": 12, "sigma_begin": 50, "sigma_end": 0.01, "ema": True},
    "sampling": {"step_lr": 6.2e-6, "n_steps_each": 5, "denoise": True},
}


def as_namespaces(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return argparse.Namespace(**{key: as_namespaces(value) for key, value in values.items()})


def write_options(file: Path, options: dict[str, Any], **changes: Any) -> Path:
    """As the published code dumps them."""
    merged = {k: v | changes.get(k, {}) for k, v in options.items()}
    file.write_text(yaml.dump(as_namespaces(merged)))
    return file


def first(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A file of NCSN."""
    state = dict(published(network(True, 10)))
    if change is not None:
        change(state)
    torch.save([state, {}], folder / "checkpoint.pth", _use_new_zipfile_serialization=False)
    return folder / "checkpoint.pth"


def second(
    folder: Path,
    change: Callable[[dict[str, Any]], None] | None = None,
    ema: Mapping[str, Tensor] | None = None,
    levels: int = 12,
    **sizes: Any,
) -> Path:
    """A file of NCSNv2, with averages."""
    state: dict[str, Any] = published(network(False, levels, **sizes))
    averages = {name.removeprefix("module."): 2 * value for name, value in state.items()}
    ratio = torch.linspace(1, 0, levels, dtype=torch.float64)
    state["module.sigmas"] = (0.01 * 5000**ratio).float()
    if change is not None:
        change(state)
    parts = [state, {}, 3, 70, averages if ema is None else ema]
    torch.save(parts[: 4 if ema == {} else 5], folder / "checkpoint_70.pth")
    return folder / "checkpoint_70.pth"


def outcome(monkeypatch: Any, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script."""
    monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run(lambda: import_command(sys.argv[1:]))
    captured = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def test_options_beside_the_file_decide(monkeypatch, capsys, tmp_path):
    file = first(tmp_path)
    write_options(tmp_path / "config.yml", OPTIONS)
    code, text, errors = outcome(monkeypatch, capsys, "auto", file, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert "ncsn of cifar10" in text and "last weights" in text and "by config.yml" in text
    config = load_run_config(tmp_path / "run")
    assert isinstance(config, NCSNTrainConfig)
    assert config.score.ladder.levels == 10 and config.score.ladder.sigma_max == 2
    assert (config.sampler.nfe, config.sampler.denoise) == (1000, False)
    assert config.sampler.step_ratio == pytest.approx(0.4)
    assert (config.optim.lr, config.optim.eps) == (0.002, 1e-6)
    assert (config.train.batch_size, config.train.max_steps) == (64, 1000)
    assert lsgm.load(tmp_path / "run").kind == "ncsn"


def test_averages_are_the_default(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = second(tmp_path)
    write_options(tmp_path / "config.yml", SECOND)
    code, text, _ = outcome(monkeypatch, capsys, "ncsnv2", file, "--out", tmp_path / "a")
    assert code == 0 and "averaged weights, 70 steps" in text
    arguments = "ncsnv2", file, "--out", tmp_path / "b", "--weights", "raw"
    assert outcome(monkeypatch, capsys, *arguments)[0] == 0
    ema, raw = (lsgm.load(tmp_path / run).score.conv_in.weight for run in "ab")
    assert torch.equal(ema, 2 * raw)
    config = load_run_config(tmp_path / "a")
    assert isinstance(config, NCSNTrainConfig)
    assert (config.sampler.nfe, config.sampler.denoise) == (61, True)


def test_a_published_network_is_found_by_its_shapes(tmp_path: Path) -> None:
    """NCSNv2 by its levels; what two runs share by the name of the folder."""
    for form, names in PUBLISHED.items():
        for published_name, name in names.items():
            config = load_config(NCSNTrainConfig, name)
            model = meta_model(config)
            folder = tmp_path / form / published_name
            folder.mkdir(parents=True)
            with torch.device("meta"):
                state = published(model.score)
            small = {key: torch.empty(1).expand(value.shape) for key, value in state.items()}
            parts: list[Any] = [small, {}]
            if form == "ncsnv2":
                small["module.sigmas"] = (model.ladder.sigmas / 2).float()
                parts = [small, {}, 1, 2]
            torch.save(parts, folder / "checkpoint.pth")
            chosen, said = choose_config(read_ncsn(folder / "checkpoint.pth", form))
            assert chosen == config, said


CONFIG_TEXT = "kind: score_sde\n"
BAD: dict[str, tuple[str, Callable[[Path], list[object]], str]] = {
    "no options, no published sizes": (
        "ncsn", lambda d: [first(d)], "give that with --config",
    ),
    "other format": ("ncsnv2", lambda d: [first(d)], "import it as ncsn"),
    "other format the other way": ("ncsn", lambda d: [second(d)], "import it as ncsnv2"),
    "mixed prefixes": (
        "ncsn",
        lambda d: [first(d, lambda s: s.update({"extra": s.pop("module.end_conv.bias")}))],
        "put together from two files",
    ),
    "missing weight": (
        "ncsn",
        lambda d: [first(d, lambda s: s.pop("module.res3.0.conv1.bias")), write_options(
            d / "config.yml", OPTIONS)],
        "res3.0.conv1.bias is missing",
    ),
    "extra weight": (
        "ncsn",
        lambda d: [first(d, lambda s: s.update({"module.more": torch.zeros(2)})), write_options(
            d / "config.yml", OPTIONS)],
        "more is unknown",
    ),
    "other size": (
        "ncsn",
        lambda d: [first(d, lambda s: s.update({"module.end_conv.bias": torch.zeros(5)})),
            write_options(d / "config.yml", OPTIONS)],
        "conv_out.bias is 5, not 3",
    ),
    "not a number": (
        "ncsn",
        lambda d: [first(d, lambda s: s["module.end_conv.bias"].fill_(torch.nan)), write_options(
            d / "config.yml", OPTIONS)],
        "take an earlier checkpoint",
    ),
    "no tensor": (
        "ncsn", lambda d: [first(d, lambda s: s.update({"module.a": "b"}))], "is no tensor",
    ),
    "baseline without levels": (
        "ncsnv2",
        lambda d: [second(d, lambda s: s.update(
            {"module.refine1.adapt_convs.0.1_1_norm.alpha": torch.zeros(2)}))],
        "RefineNetDilated",
    ),
    "no noise levels": (
        "ncsnv2", lambda d: [second(d, lambda s: s.pop("module.sigmas"))], "no noise levels",
    ),
    "no averages": (
        "ncsnv2",
        lambda d: [second(d, ema={}), write_options(d / "config.yml", SECOND)],
        "--weights raw",
    ),
    "averages of another network": (
        "ncsnv2",
        lambda d: [second(d, ema={"a": torch.zeros(1)}), write_options(d / "config.yml", SECOND)],
        "--weights raw",
    ),
    "averages of NCSN": (
        "ncsn",
        lambda d: [first(d), "--weights", "ema", write_options(d / "config.yml", OPTIONS)],
        "--weights raw",
    ),
    "levels of another run": (
        "ncsn",
        lambda d: [first(d), write_options(d / "config.yml", OPTIONS, model={"num_classes": 7})],
        "has 10 noise levels",
    ),
    "noise of another run": (
        "ncsnv2",
        lambda d: [second(d), write_options(d / "config.yml", SECOND, model={"sigma_begin": 9})],
        "its noise goes from",
    ),
    "unknown dataset": (
        "ncsn",
        lambda d: [first(d), write_options(d / "config.yml", OPTIONS, data={"dataset": "CATS"})],
        "data.dataset 'CATS'",
    ),
    "logits": (
        "ncsn",
        lambda d: [first(d), write_options(
            d / "config.yml", OPTIONS, data={"logit_transform": True})],
        "logit_transform",
    ),
    "options without a section": (
        "ncsn",
        lambda d: [first(d), (d / "config.yml").write_text("model: {ngf: 2}\n")],
        "has no data",
    ),
    "options without a value": (
        "ncsn",
        lambda d: [first(d), (d / "config.yml").write_text(
            "data: {dataset: CIFAR10}\nmodel: {ngf: 2}\n")],
        "num_classes",
    ),
    "options that are no YAML": (
        "ncsn",
        lambda d: [first(d), (d / "config.yml").write_text("a: [1\nb: {")],
        "cannot be read as the run's options",
    ),
    "configuration of another kind": (
        "ncsn",
        lambda d: [first(d), "--config", d / "own.yaml", (d / "own.yaml").write_text(CONFIG_TEXT)],
        "kind ncsn",
    ),
    "no such configuration": (
        "ncsn", lambda d: [first(d), "--config", d / "none.yaml"], "none.yaml",
    ),
    "truncated": (
        "ncsn",
        lambda d: [first(d), (d / "checkpoint.pth").write_bytes(
            (d / "checkpoint.pth").read_bytes()[:999])],
        "not a file of torch.save",
    ),
    "a dictionary": (
        "ncsn", lambda d: [d / "x.pth", torch.save({"model": 1}, d / "x.pth")], "a dictionary",
    ),
    "a list of something else": (
        "ncsn", lambda d: [d / "x.pth", torch.save([1, 2], d / "x.pth")], "not weights",
    ),
    "other network": (
        "ncsnv2",
        lambda d: [d / "x.pth", torch.save([{"a.b": torch.zeros(1)}, {}], d / "x.pth")],
        "no network of NCSN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_and_leave_nothing(
    name: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    form, make, message = BAD[name]
    given = [
        a for a in make(tmp_path) if isinstance(a, str | Path) and Path(a).name != "config.yml"
    ]
    code, text, errors = outcome(
        monkeypatch, capsys, form, given[0], "--out", tmp_path / "run", *given[1:]
    )
    assert (code, text) == (2, "")
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_nothing_in_the_options_is_called(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file, trace = first(tmp_path), tmp_path / "trace"
    text = write_options(tmp_path / "config.yml", OPTIONS).read_text()
    call = f"device: !!python/object/apply:os.mkdir ['{trace}']\n"
    (tmp_path / "config.yml").write_text(text + call)
    assert outcome(monkeypatch, capsys, "ncsn", file, "--out", tmp_path / "run")[0] == 0
    assert not trace.exists()


@pytest.mark.parametrize("prefix", [True, False])
def test_data_parallel_or_not(prefix: bool, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        if not prefix:
            for name in list(state):
                state[name.removeprefix("module.")] = state.pop(name)

    read = read_ncsn(first(tmp_path, change), "ncsn")
    assert "begin_conv.weight" in read.state and read.levels == 10 and read.stages == 4
