"""``benchmark memory``: counted without memory, equal to what a real step takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lsgm.benchmark.accounting import peak_memory
from lsgm.benchmark.memory import (
    _fake_tensors,
    lsgm_step_memory,
    memory_command,
    vae_step_memory,
)
from lsgm.benchmark.training import training_step, vae_stage
from lsgm.config.command_line import load_config
from lsgm.config.training import LSGMTrainConfig, VAETrainConfig
from lsgm.data import build_datasets
from lsgm.errors import UserError

BATCH = 16


@pytest.fixture(scope="module")
def vae() -> VAETrainConfig:
    config = load_config(VAETrainConfig, "digits/vae")
    return replace(config, train=replace(config.train, precision="float32", batch_size=BATCH))


def test_storages_count_once_and_while_they_live() -> None:
    with _fake_tensors() as live:
        x = torch.zeros(1000)  # 4,000 bytes
        view = x[::2]
        y = view * 2.0  # 2,000 more
        z = y + 1.0  # 2,000 more
        del y
        w = z.double()  # 4,000 in place of those
        assert (live.bytes, live.peak) == (10_000, 10_000)
        del x, z, w
        assert live.bytes == 4_000  # the view holds all of x
        del view
        assert live.bytes == 0


@pytest.mark.slow
def test_a_step_takes_what_it_takes_in_truth(vae: VAETrainConfig) -> None:
    """Peak beyond weights and averages, against the profile of real steps of the same network."""
    datasets = build_datasets(vae.data)
    spec = datasets.spec
    without = replace(vae, optim_vae=replace(vae.optim_vae, ema_decay=0.0))
    counted = vae_step_memory(without, spec, BATCH)
    stage = vae_stage(without, spec, torch.device("cpu"))
    images = datasets.train.batch(torch.arange(BATCH))
    step = training_step(stage, {"vae": vae.optim_vae}, images, "float32")
    measured = peak_memory(step, 2, torch.device("cpu")) * 2**20
    assert counted.averages == 0
    # oneDNN packs kernels and images in buffers of its own
    assert counted.peak - counted.weights == pytest.approx(measured, rel=0.1)
    expected = sum(t.nbytes for t in (*stage.parameters(), *stage.buffers()))
    assert counted.weights == expected


def test_parts_are_those_of_the_optimizer_and_the_average(vae: VAETrainConfig) -> None:
    spec = build_datasets(vae.data).spec
    stage = vae_stage(vae, spec, torch.device("cpu"))
    parameters = sum(p.nbytes for p in stage.parameters())
    counted = vae_step_memory(vae, spec, BATCH)
    # two moments a parameter, and a count of four bytes a tensor
    tensors = len(list(stage.parameters()))
    assert counted.optimizer == pytest.approx(2 * parameters + 4 * tensors, abs=8 * tensors)
    assert counted.averages == pytest.approx(counted.weights, rel=0.01)
    assert counted.activations > parameters  # the gradients


def test_activations_grow_with_the_batch_and_shrink_when_they_are_recomputed(
    vae: VAETrainConfig,
) -> None:
    spec = build_datasets(vae.data).spec
    small, middle, large = (vae_step_memory(vae, spec, n).activations for n in (32, 64, 96))
    assert large - middle == pytest.approx(middle - small, rel=0.05)
    recomputed = replace(vae, vae=replace(vae.vae, activation_checkpointing=True))
    assert vae_step_memory(recomputed, spec, 96).activations < 0.8 * large


def test_both_sides_of_a_second_stage_count(vae: VAETrainConfig) -> None:
    spec = build_datasets(vae.data).spec
    second = load_config(LSGMTrainConfig, "digits/lsgm")
    joint = lsgm_step_memory(vae, second, spec, BATCH)
    frozen = replace(second, prior=replace(second.prior, training="frozen"))
    alone = lsgm_step_memory(vae, frozen, spec, BATCH)
    assert alone.weights == joint.weights
    assert alone.optimizer < joint.optimizer
    assert alone.activations < joint.activations


def test_the_command_needs_no_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--data.name", "folder", "--data.root", "/nowhere", "--data.channels", "3"]
    arguments = ["--config", "digits/vae", *folder, "--vae.decoder_dist", "dml"]
    memory_command([*arguments, "--data.image_size", "16", "--batch", "1,2"])
    rows = [row.split(" | ")[:3] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == ["VAE"] * 2 + ["LSGM joint"] * 2
    assert [row[2] for row in rows] == ["1", "2"] * 2
    with pytest.raises(UserError, match="--batch: must be positive"):
        memory_command([*arguments, "--data.image_size", "16", "--batch", "1,0"])
    with pytest.raises(UserError, match="image_size"):
        memory_command(arguments)
