"""Evaluations of small untrained models, on one process or, by :func:`join`, on several."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from lsgm.config.architecture import (
    ClassifierConfig,
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
    VAEConfig,
)
from lsgm.config.training import DataConfig, ScoreObjectiveConfig, TrainConfig
from lsgm.data import ArrayDataset, Datasets, DataSpec
from lsgm.models.classifier import build_classifier
from lsgm.models.images import build_data_model
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.system.files import RunFolder
from lsgm.training import evaluation
from lsgm.training.context import EvalContext
from lsgm.training.distributed import World, distributed, on_main
from lsgm.training.evaluation import evaluate_classifier, evaluate_score_model, evaluate_vae

SPEC = DataSpec("classes", channels=3, image_size=8, padding=0, binary=False, num_classes=4)
CLASS_SIZE = 30
TRAIN = TrainConfig(batch_size=8, eval_images=21, device="cpu")
NETWORK = PriorNetworkConfig(num_channels=16, num_scales=1, num_cells_per_scale=1, embedding_dim=16)
VAE = VAEConfig(
    num_channels_enc=8, num_channels_dec=8, channel_mult=(1, 2), num_preprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, num_latent_scales=1, num_groups_per_scale=2,
    num_latent_per_group=2, cell="res_bnswish", decoder_dist="dml",
)  # fmt: skip


def datasets() -> Datasets:
    """Images in the order of their four classes, as a folder of classes gives them."""
    rng = torch.Generator().manual_seed(0)
    num = SPEC.num_classes * CLASS_SIZE
    images = torch.randint(0, 256, (num, 3, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.arange(num) // CLASS_SIZE
    return Datasets(ArrayDataset(images, labels), ArrayDataset(images, labels), SPEC)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random weights everywhere, so that no part of it is trivial."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=rng)
    return model.eval()


def vae() -> VAEModel:
    torch.manual_seed(0)
    return shaken(VAEModel(build_vae(VAE, SPEC), SPEC, VAE))


def lsgm_model() -> LSGM:
    torch.manual_seed(0)
    first, prior = build_vae(VAE, SPEC), PriorConfig(NETWORK, mixing_init=-2.0)
    return shaken(LSGM(first, build_prior(prior, first), SPEC, VAE, prior))


def score_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = ScoreModelConfig(ncsnpp=NETWORK, sde=SDEConfig(time_eps=1e-2), class_conditional=True)
    sampler = SamplerConfig(solver="ddim", nfe=3)
    return shaken(build_data_model("score_sde", config, sampler, SPEC))


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    config = ClassifierConfig(noise_conditional=True, num_channels=8, num_scales=2)
    return shaken(build_classifier(config, ScoreModelConfig(), SPEC))


def context(world: World, out: Path, train: TrainConfig = TRAIN) -> EvalContext:
    @contextlib.contextmanager
    def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda count: None

    def log_image(name: str, image: Tensor) -> None: ...

    return EvalContext(
        stage=None, models={}, step=1, epoch=0, total_steps=1, config=train,
        run=RunFolder(out), world=world, log_image=log_image, bar=no_bar,
    )  # fmt: skip


def evaluate_all(world: World, out: Path) -> dict[str, object]:
    """The numbers of all evaluations, and how many images this process put through the VAE."""
    if world.is_main:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    data, place, seen = datasets(), context(world, out), []
    model, first = lsgm_model(), vae()
    first.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad(), mock.patch.object(evaluation, "SAMPLES", 10):
        return {
            "vae": evaluate_vae(first, data, DataConfig(), place),
            "images": sum(seen),
            "batch": max(seen),
            "lsgm": evaluate_vae(model, data, DataConfig(), place),
            "score": evaluate_score_model(score_model(), ScoreObjectiveConfig(), data, place),
            "classifier": evaluate_classifier(classifier(), data, place),
        }


def join(out: Path, environment: dict[str, str]) -> None:
    """Be one of the processes, once all are there, and write what this one finds."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    rank, size = environment["RANK"], int(environment["WORLD_SIZE"])
    (out / f"ready{rank}").touch()
    while len(list(out.glob("ready*"))) < size:
        time.sleep(0.01)
    # Wait much less in a training step than for the main process.
    with distributed("cpu", timeout_minutes=3 / 60) as world:
        waited = on_main(world, lambda: time.sleep(4) or "done")
        assert waited == "done"
        found = evaluate_all(world, out)
    (out / f"rank{rank}.json").write_text(json.dumps(found))
