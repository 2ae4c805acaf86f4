"""Published checkpoints as run folders: the same model comes back; what does not fit is named."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damages
from torch import Tensor

import lsgm
from lsgm.commands.run import run
from lsgm.config.command_line import load_run_config
from lsgm.config.training import LSGMTrainConfig, VAETrainConfig
from lsgm.errors import UserError
from lsgm.importers.command import import_command
from lsgm.importers.official import load_official_vae, read_official_checkpoint
from lsgm.importers.official_names import published_names
from lsgm.importers.official_prior import load_official_prior
from lsgm.importers.runs import import_official_lsgm
from lsgm.models.latent import LSGM
from lsgm.models.release import load_data_config
from vae import HierarchicalVAE


def _fixtures(pattern: str) -> list[Any]:
    folder = os.environ.get("LSGM_PARITY_DIR")
    found = sorted(Path(folder).glob(pattern)) if folder else []
    missing = pytest.mark.skip(reason=f"no {pattern} in LSGM_PARITY_DIR")
    return [pytest.param(path, id=path.stem) for path in found] or [
        pytest.param(None, marks=missing)
    ]


ARGS: dict[str, Any] = {
    "dataset": "omniglot",
    "arch_instance": "res_bnswish",
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "channel_mult": [1, 2],
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 1,
    "num_postprocess_cells": 1,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 3,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_nf": 0,
    "decoder_dist": "bin",
    "num_x_bits": 8,
    "learning_rate_vae": 1e-2,
    "learning_rate_min_vae": 1e-4,
    "epochs": 10,
    "warmup_epochs": 2,
    "num_total_iter": 50,
    "batch_size": 4,
    "num_process_per_node": 2,
    "kl_max_coeff": 0.7,
    "weight_decay_norm": 0.03,
}


def publish(path: Path, **changes: Any) -> Path:
    """A small first-stage checkpoint in the published layout; ``changes`` go into its options."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in ARGS.items() if k.startswith(("num_", "channel", "decoder"))}
    for name in ("num_postprocess_blocks", "num_total_iter", "num_process_per_node"):
        del sizes[name]
    vae = HierarchicalVAE(
        **sizes, image_channels=1, image_size=32, cell="res_bnswish", use_se=True, crop=2
    )
    state = vae.state_dict()
    published = {name: state[ours] for name, ours in published_names(vae).items()}
    args = argparse.Namespace(**(ARGS | changes))
    torch.save({"args": args, "global_step": 50, "vae_state_dict": published}, path)
    return path


def assert_same_vae(ours: HierarchicalVAE, theirs: HierarchicalVAE) -> None:
    """Both give the same posterior draw, likelihood and sample, bit by bit."""
    theirs.eval()
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, ours.image_channels, *ours.image_size, generator=rng)
    x = 2 * x.round() - 1
    a, b = (vae(x, rng=torch.Generator().manual_seed(1)) for vae in (ours, theirs))
    for name in ("eps", "log_q", "mu", "log_sigma"):
        pairs = zip(getattr(a.posterior, name), getattr(b.posterior, name), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs), name
    assert torch.equal(a.likelihood.log_prob(x), b.likelihood.log_prob(x))
    assert torch.equal(ours.reconstruction(a, x), theirs.reconstruction(b, x))


@pytest.mark.parametrize("path", _fixtures("nvae_*.pt"))
@torch.no_grad()
def test_first_stage_computes_the_same(path: Path, tmp_path: Path) -> None:
    imported = import_official_lsgm(path, tmp_path / "run")
    model = lsgm.load(tmp_path / "run")
    checkpoint = read_official_checkpoint(path)
    assert imported.kind == model.kind == "vae" and imported.weights == "raw"
    assert_same_vae(model.vae, load_official_vae(checkpoint, "raw"))
    config = load_run_config(tmp_path / "run")
    assert isinstance(config, VAETrainConfig)
    assert config.vae == model.vae_config
    assert config.data == load_data_config(tmp_path / "run")
    if checkpoint.vae_ema is None:
        with pytest.raises(UserError, match="no averaged"):
            import_official_lsgm(path, tmp_path / "ema", "ema")
        assert not (tmp_path / "ema").exists()
    else:
        import_official_lsgm(path, tmp_path / "ema", "ema")
        assert_same_vae(lsgm.load(tmp_path / "ema").vae, load_official_vae(checkpoint, "ema"))


def check_options(config: LSGMTrainConfig, args: dict[str, Any]) -> None:
    prior = config.prior
    for name in ("beta_start", "beta_end", "sigma2_0", "sigma2_min", "sigma2_max", "time_eps"):
        assert getattr(prior.sde, name) == args[name]
    for name in ("embedding_dim", "embedding_type", "dropout", "fir", "progressive"):
        assert getattr(prior.network, name) == args[name]
    assert prior.network.num_channels == args["num_channels_dae"]
    assert prior.mixing_init == args["mixing_logit_init"]
    assert prior.training == ("disjoint" if args["disjoint_training"] else "joint")
    assert prior.drop_inactive == args["drop_inactive_var"]
    assert prior.update_q_ema == args["update_q_ema"]
    assert config.optim_prior.ema_decay == args["ema_decay"]
    assert config.optim_prior.lr == args["learning_rate_dae"]
    start = args["kl_const_coeff_vada"] if args["cont_kl_anneal"] else 1.0
    assert config.objective.kl_const_coeff == start


@pytest.mark.parametrize("path", _fixtures("prior_*.pt"))
@torch.no_grad()
def test_second_stage_computes_the_same(path: Path, tmp_path: Path) -> None:
    imported = import_official_lsgm(path, tmp_path / "run")
    model = lsgm.load(tmp_path / "run")
    assert isinstance(model, LSGM) and imported.weights == "ema"
    checkpoint = read_official_checkpoint(path)
    assert_same_vae(model.vae, load_official_vae(checkpoint, "raw"))
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(3, *model.vae.top_shape, generator=rng)
    t = torch.tensor([0.05, 0.5, 1.0])
    averaged = load_official_prior(checkpoint.raw, "ema")(x, t)
    assert torch.equal(model.score(x, t), averaged)
    assert model.sde == load_official_prior(checkpoint.raw, "ema").sde
    config = load_run_config(tmp_path / "run")
    assert isinstance(config, LSGMTrainConfig) and config.prior == model.prior_config
    check_options(config, checkpoint.args)
    if "dae_optimizer" in checkpoint.raw:
        import_official_lsgm(path, tmp_path / "raw", "raw")
        last = lsgm.load(tmp_path / "raw").score(x, t)
        assert torch.equal(last, load_official_prior(checkpoint.raw, "raw")(x, t))
        assert not torch.equal(last, averaged)
    else:
        with pytest.raises(UserError, match="only the prior's averaged"):
            import_official_lsgm(path, tmp_path / "raw", "raw")


@torch.no_grad()
def test_training_options_become_a_configuration(tmp_path: Path) -> None:
    import_official_lsgm(publish(tmp_path / "c.pt"), tmp_path / "run")
    config = load_run_config(tmp_path / "run")
    assert isinstance(config, VAETrainConfig)
    assert (config.name, config.data.name) == ("run", "omniglot")
    assert (config.train.epochs, config.train.batch_size) == (10, 8)
    assert (config.optim_vae.warmup_steps, config.optim_vae.schedule) == (10, "published")
    assert config.objective.kl_max_coeff == 0.7
    assert config.objective.spectral_regularization == 0.03
    eps = lsgm.load(tmp_path / "run").sample_latents(2, torch.Generator().manual_seed(0))
    images: Tensor = lsgm.load(tmp_path / "run").decode(eps)
    assert images.shape == (2, 1, 28, 28)


def outcome(monkeypatch: Any, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the script."""
    monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run(lambda: import_command(sys.argv[1:]))
    captured = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def test_command_line(monkeypatch, capsys, tmp_path):
    file = publish(tmp_path / "c.pt")
    out = tmp_path / "run"
    code, text, errors = outcome(monkeypatch, capsys, "official-lsgm", file, "--out", out)
    assert (code, errors) == (0, "")
    assert text.startswith(f"{out}: vae of omniglot, ") and "50 steps" in text
    again = outcome(monkeypatch, capsys, "official-lsgm", file, "--out", out)
    assert again[0] == 2 and "already holds a run" in again[2]
    for wrong in ([], ["other", file, "--out", out], ["official-lsgm", file]):
        code, _, errors = outcome(monkeypatch, capsys, *wrong)
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1


class _Executed:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["truncated", "text", "missing", "tensor", "other", "code"])
def test_wrong_files_are_one_line_and_leave_nothing(
    monkeypatch: Any, capsys: Any, tmp_path: Path, kind: str
) -> None:
    file, out, trace = tmp_path / "wrong.pt", tmp_path / "run", tmp_path / "trace"
    if kind == "truncated":
        whole = publish(tmp_path / "whole.pt").read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        file.write_text("name: omniglot\n")
    elif kind == "tensor":
        torch.save(torch.zeros(3), file)
    elif kind == "other":
        torch.save({"model": torch.zeros(3), "step": 1}, file)
    elif kind == "code":
        torch.save({"args": _Executed(trace), "vae_state_dict": {}}, file)
    code, text, errors = outcome(monkeypatch, capsys, "official-lsgm", file, "--out", out)
    assert (code, text) == (2, "")
    assert errors.startswith(f"error: checkpoint {file}: ") and errors.count("\n") == 1
    assert not out.exists() and not trace.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"arch_instance": "res_new"}, "res_new"),
        ({"dataset": "cifar10"}, "cifar10"),
        ({"decoder_dist": "dml"}, "decoder_dist"),
        ({"num_channels_enc": 16}, "stem"),
        ({"num_latent_scales": 2}, "channel_mult"),
        ({"progressive_input_vae": "residual"}, "progressive_input_vae"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    file = publish(tmp_path / "c.pt", **change)
    with pytest.raises(UserError, match=named) as caught:
        import_official_lsgm(file, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_damaged_file_is_one_line_or_the_same_weights(tmp_path: Path) -> None:
    file = publish(tmp_path / "c.pt")
    content, whole = file.read_bytes(), read_official_checkpoint(file)
    refused = 0
    for damaged in damages(content):
        file.write_bytes(damaged)
        try:
            found = read_official_checkpoint(file)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"checkpoint {file}: ") and "\n" not in str(error)
        else:  # padding between the records
            assert found.args == whole.args
            assert all(torch.equal(v, whole.vae_state[k]) for k, v in found.vae_state.items())
    assert refused > 250


def test_the_run_knows_its_file(tmp_path: Path) -> None:
    file = publish(tmp_path / "c.pt")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    imported = import_official_lsgm(file, tmp_path / "run")
    assert imported.sha256 == digest and digest in str(imported)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["imported"] == {
        "file": "c.pt",
        "sha256": digest,
        "weights": "raw",
    }


def _of_state(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(raw: dict[str, Any]) -> None:
        change(raw["vae_state_dict"])

    return apply


def _of_args(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: vars(raw["args"]).update(changes)


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "options that are a number": lambda raw: raw.update(args=3),
    "weights that are a list": lambda raw: raw.update(vae_state_dict=[1]),
    "weights that are text": _of_state(lambda state: state.update({"stem.bias": "x"})),
    "integer weights": _of_state(lambda s: s.update({"stem.bias": s["stem.bias"].int()})),
    "complex weights": _of_state(lambda s: s.update({"stem.bias": s["stem.bias"] + 1j})),
    "NaN": _of_state(lambda s: s["stem.bias"].fill_(float("nan"))),
    "a missing weight": _of_state(lambda s: s.pop("stem.bias")),
    "a flat weight": _of_state(lambda s: s.update({"stem.weight": s["stem.weight"].flatten()})),
    "a flat image": _of_state(lambda s: s.update(prior_ftr0=torch.zeros(()))),
    "an optimizer that is text": lambda raw: raw.update(vae_optimizer="adam"),
    "an optimizer's state that is a list": lambda raw: raw.update(vae_optimizer={"state": [1]}),
    "an average of no parameter": lambda raw: raw.update(
        vae_optimizer={"state": {-1: {"ema": torch.zeros(1)}}}
    ),
    "an average that is NaN": lambda raw: raw.update(
        vae_optimizer={"state": {0: {"ema": torch.full((8, 1, 3, 3), float("nan"))}}}
    ),
    "steps that are text": lambda raw: raw.update(global_step="many"),
    "power vectors of nothing": lambda raw: raw.update(sn_calculator={"sr_u": 3}),
    "text for a number": _of_args(num_channels_enc="8"),
    "no whole number": _of_args(num_channels_enc=8.5),
    "a billion channels": _of_args(num_channels_enc=10**9),
    "a number of 30 digits": _of_args(num_latent_per_group=10**30),
    "a thousand halvings": _of_args(num_preprocess_blocks=1000),
    "a negative count": _of_args(num_groups_per_scale=-1),
    "a list for a name": _of_args(dataset=["omniglot"]),
    "a rate that is NaN": _of_args(learning_rate_vae=float("nan")),
    "epochs that are text": _of_args(warmup_epochs="two"),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_contents_are_one_line(
    monkeypatch: Any, capsys: Any, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    file, out = publish(tmp_path / "c.pt"), tmp_path / "run"
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(file, weights_only=True)
    change(raw)
    torch.save(raw, file)
    code, text, errors = outcome(monkeypatch, capsys, "official-lsgm", file, "--out", out)
    assert (code, text) == (2, "") and not out.exists()
    assert errors.startswith("error: checkpoint") and errors.count("\n") == 1


def test_a_file_without_checksums_is_not_trusted(tmp_path: Path) -> None:
    file = publish(tmp_path / "c.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(file, weights_only=True)
    torch.save(raw, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip file"):
        read_official_checkpoint(file)
