"""Presets are functions of the data and the machine, and trainings say what they do."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lsgm.commands.main import COMMANDS
from lsgm.commands.presets import rewritten
from lsgm.config.presets import (
    DataFacts,
    Machine,
    choose_preset,
    lsgm_preset,
    vae_preset,
)
from lsgm.config.training import DataConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.latent import build_prior, build_vae
from lsgm.networks import NCSNpp
from lsgm.networks.layers import resolution

CPU = Machine("cpu", 16 * 2**30)
SIZES = [16, 28, 64, 256, 512]


def spec_of(size: int, kind: str) -> DataSpec:
    padding = 2 if size == 28 else 0
    return DataSpec("folder", 3 if kind == "colour" else 1, size, padding, kind == "binary")


def facts_of(spec: DataSpec, count: int = 5000) -> DataFacts:
    return DataFacts(*spec.network_shape, spec.channels, spec.binary, count)


def built(name, size: int, kind: str):
    """Both networks on ``meta``, with their configurations."""
    spec = spec_of(size, kind)
    data, facts = DataConfig("folder"), facts_of(spec)
    config = vae_preset(name, facts, data, CPU)
    with torch.device("meta"):
        vae = build_vae(config.vae, spec)
    channels, *sides = vae.top_shape
    lsgm = lsgm_preset(name, facts, data, CPU, vae.top_shape)
    with torch.device("meta"):
        prior = NCSNpp(channels, resolution(sides), **asdict(lsgm.prior.network))
    return config, lsgm, vae, prior


def size_of(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", ["colour", "binary"])
@pytest.mark.parametrize("size", SIZES)
def test_every_preset_builds_and_grows(size, kind):
    vaes, priors = [], []
    for name in ("small", "medium"):
        config, lsgm, vae, prior = built(name, size, kind)
        colour = "dl" if name == "small" and size >= 128 else "dml"
        assert config.vae.decoder_dist == ("bin" if kind == "binary" else colour)
        assert 8 <= min(vae.top_shape[1:]) < 16 or size < 16
        assert config.train.batch_size <= 5000 and lsgm.train.epochs >= 1
        vaes.append(size_of(vae))
        priors.append(size_of(prior))
    assert vaes[0] < vaes[1] / 4 and priors[0] < priors[1] / 4


@pytest.mark.parametrize(
    ("size", "kind", "channels"), [(28, "binary", 1), (32, "colour", 3), (256, "colour", 3)]
)
def test_large_is_the_published_architecture(size, kind, channels):
    config, lsgm, vae, prior = built("large", size, kind)
    assert config.data == lsgm.data == DataConfig("folder")
    assert size_of(vae) > 2.5e6 and size_of(prior) > 5e7
    small = built("small", size, kind)
    assert size_of(small[2]) < size_of(vae) and size_of(small[3]) < size_of(prior)


def test_the_length_of_a_training_follows_the_number_of_pictures():
    spec = spec_of(32, "colour")
    epochs = [
        vae_preset("small", facts_of(spec, n), DataConfig("folder"), CPU).train.epochs
        for n in (100, 1000, 10_000, 1_000_000)
    ]
    assert epochs == [1000, 100, 10, 1]
    few = vae_preset("small", facts_of(spec, 40), DataConfig("folder"), CPU)
    assert few.train.batch_size == 10


@pytest.mark.parametrize("shape", [(48, 64), (40, 24), (31, 17)])
def test_any_shape_that_is_not_square(shape):
    spec = replace(spec_of(32, "colour"), image_size=shape[0], image_width=shape[1])
    config = vae_preset("small", facts_of(spec), DataConfig("folder"), CPU)
    vae = build_vae(config.vae, spec)
    lsgm = lsgm_preset("small", facts_of(spec), DataConfig("folder"), CPU, vae.top_shape)
    build_prior(lsgm.prior, vae)


def test_the_machine_decides():
    gib = 2**30
    assert choose_preset(CPU)[0] == "small"
    assert choose_preset(Machine("cuda", 6 * gib))[0] == "small"
    assert choose_preset(Machine("cuda", 24 * gib))[0] == "medium"
    assert choose_preset(Machine("cuda", 80 * gib))[0] == "medium"
    assert choose_preset(Machine("cuda", 80 * gib, 8))[0] == "large"
    spec = spec_of(32, "colour")
    for bf16 in (False, True):
        config = vae_preset("small", facts_of(spec), DataConfig("folder"), replace(CPU, bf16=bf16))
        assert config.train.precision == ("bf16" if bf16 else "float32")


def test_short_options():
    assert rewritten(["--data", "mnist", "--seed"]) == ["--data.name", "mnist", "--seed"]
    assert rewritten(["--data", "some/folder", "--image_size", "64"]) == [
        "--data.name", "folder", "--data.root", "some/folder", "--data.image_size", "64",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--data: needs a value"):
        rewritten(["--data", "--preset", "small"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(24):
        colour = rng.integers(0, 256, 3)
        Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(root / f"{i}.png")
    return root


QUICK = ("--train.max_steps", "2", "--train.device", "cpu", "--train.num_threads", "1")


def run(command: str, *arguments: object) -> None:
    COMMANDS[command]([str(a) for a in arguments], f"lsgm {command}")


def test_two_lines_train_on_ones_own_pictures(pictures, tmp_path, capfd):
    vae, lsgm = tmp_path / "vae", tmp_path / "lsgm"
    run("train-vae", "--data", pictures, "--image_size", 16, *QUICK, "--out", vae)
    out, log = capfd.readouterr()
    assert "preset small (a CPU with" in out
    assert "22 colour images of 16 x 16" in out
    for words in ("model: ", "device: 1 x cpu with 1 threads", "training: 2 steps of 5 images"):
        assert words in out
    last = out.strip().splitlines()[-2:]
    assert last[0].startswith(f"{vae}: trained for") and "bits_per_dim" in last[0]
    assert last[1] == f"next: lsgm train-lsgm --vae {vae}"
    assert log.index("bits_per_dim") < log.index("nelbo")
    run("train-lsgm", "--vae", vae, *QUICK, "--out", lsgm, "--prior.mixing_init", "-4")
    out, _ = capfd.readouterr()
    assert "preset small" in out and "prior of" in out
    assert out.strip().splitlines()[-2:] == [
        f"next: lsgm sample --run {lsgm}", f"next: lsgm evaluate --run {lsgm}",
    ]  # fmt: skip
    written = yaml.safe_load((lsgm / "config.yaml").read_text())
    assert written["prior"]["mixing_init"] == -4 and written["data"]["root"] == str(pictures)
    for again in (
        ("--resume",),
        ("--data", pictures, "--image_size", 16, *QUICK, "--resume", "auto"),
    ):
        run("train-vae", "--out", vae, *again)  # the folder knows everything
        out, _ = capfd.readouterr()
        assert "the run is finished" in out and "preset" not in out


def test_a_preset_starts_where_there_is_nothing_to_resume(pictures, tmp_path, capfd):
    data = ("--data", pictures, "--image_size", 16, *QUICK)
    run("train-vae", *data, "--out", tmp_path / "v", "--resume", "auto")
    assert "preset small" in capfd.readouterr().out


def test_a_file_lies_over_the_preset_and_an_option_over_the_file(pictures, tmp_path):
    (tmp_path / "c.yaml").write_text("vae: {num_latent_per_group: 5}\noptim_vae: {lr: 0.5}\n")
    run(
        "train-vae", "--preset", "small", "--config", tmp_path / "c.yaml", "--data", pictures,
        "--image_size", 16, "--optim_vae.lr", 0.001, *QUICK, "--out", tmp_path / "v",
    )  # fmt: skip
    written = yaml.safe_load((tmp_path / "v/config.yaml").read_text())
    assert written["vae"]["num_latent_per_group"] == 5 and written["optim_vae"]["lr"] == 0.001
    assert written["vae"]["num_groups_per_scale"] == 4 and written["name"] == "folder-vae-small"


def test_mistakes(pictures, tmp_path):
    data = ("--data", pictures, "--image_size", 16, *QUICK, "--out", tmp_path / "x")
    for arguments, words in (
        ((*data, "--preset", "tiny"), "--preset: there is no 'tiny'; there are small, medium"),
        ((*data, "--preset", "small", "--vae.decoder_dist", "bin"), "bin does not fit"),
        (("--data", pictures, *QUICK), "data.image_size"),
        (("--data", tmp_path / "absent", "--image_size", 8), "is not a folder"),
    ):
        with pytest.raises(UserError, match=words):
            run("train-vae", *arguments)
    assert not (tmp_path / "x").exists()


def test_bits_per_dim_lead_where_pixels_have_eight_bits():
    assert spec_of(32, "colour").units == ("bits_per_dim", "nelbo")
    assert spec_of(32, "binary").units == ("nelbo",)
