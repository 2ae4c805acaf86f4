"""Score models of images and classifiers by the scripts: train, stop, continue, load, measure."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny import call, checkpoint, log_lines, same

import lsgm
from lsgm.data import build_datasets
from lsgm.divergence import HutchinsonDivergence
from lsgm.models.classifier import ImageClassifier
from lsgm.models.image_likelihood import ode_data_likelihood
from lsgm.models.images import DataSGM
from lsgm.models.loading import load_classifier
from lsgm.models.release import load_data_config
from lsgm.training.runs.launch import OpenRun

TINY = """
data:
  name: digits
  augment: none
score:
  ncsnpp:
    num_channels: 8
    num_scales: 2
    num_cells_per_scale: 1
    embedding_dim: 8
    attention_resolutions: []
    middle_attention: false
  refinenet:
    num_channels: 4
    channel_mult: [1, 2]
    dilations: [1, 1]
sampler:
  nfe: 6
classifier:
  num_channels: 8
  num_scales: 2
optim:
  lr: 1.0e-2
  warmup_steps: 2
  ema_decay: 0.8
train:
  max_steps: 6
  batch_size: 64
  log_every: 1
  eval_every: 100
  eval_images: 64
  checkpoint_every: 2
  keep_checkpoints: 5
  device: cpu
  num_threads: 1
"""
KINDS = {
    "ncsn": "kind: ncsn\n",
    "sde": "kind: score_sde\n",
    "judge": "kind: classifier\n",
}
OPTIONS = {
    "ncsn": ("--sampler.nfe", "3", "--score.network", "refinenet", "--score.ladder.levels", "3"),
    "sde": ("--score.class_conditional", "true"),
    "judge": ("--classifier.noise_conditional", "true"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of each kind, with what its training printed."""
    root = tmp_path_factory.mktemp("data-space")
    runs = {}
    for name, kind in KINDS.items():
        (root / f"{name}.yaml").write_text(kind + TINY)
        command = ("--config", root / f"{name}.yaml", *OPTIONS[name])
        outcome = call("train_ncsn", *command, "--out", root / name)
        assert outcome.code == 0, outcome.err
        runs[name] = (root / name, command, outcome)
    return runs


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", KINDS)
def test_a_run_holds_what_it_should_and_learns(trained, name):
    run, _, outcome = trained[name]
    files = {path.name for path in run.iterdir()}
    assert files >= {"config.yaml", "metrics.jsonl", "model.safetensors", "run.json", "curves.png"}
    log = lines(run)
    train = [line["loss"] for line in log if line["phase"] == "train"]
    assert len(train) == 6 and train[-1] < train[0]
    assert (log[-1]["phase"], log[-1]["step"]) == ("eval", 6)
    assert "digits" in outcome.out and "classes" in outcome.out
    grids = list((run / "samples").glob("samples_*.png"))
    assert len(grids) == (0 if name == "judge" else 1)
    for grid in grids:
        with Image.open(grid) as image:
            assert image.size == (2 * (6 * 17 + 1), 2 * (6 * 17 + 1))


def test_load_gives_the_model_that_was_evaluated(trained):
    """The evaluation at the end of the training, repeated on what `lsgm.load` returns."""
    for name, kind in (("ncsn", DataSGM), ("sde", DataSGM), ("judge", ImageClassifier)):
        run = trained[name][0]
        model = (load_classifier if kind is ImageClassifier else lsgm.load)(run)
        assert isinstance(model, kind) and not model.training
        assert model.kind == {"ncsn": "ncsn", "sde": "score_sde", "judge": "classifier"}[name]
        assert model.spec.binary is False and load_data_config(run).name == "digits"
    assert lsgm.load(trained["ncsn"][0]).ladder.num_levels == 3
    assert lsgm.load(trained["sde"][0]).num_classes == 10
    # a sample by the recommended sampler, of chosen classes
    model = lsgm.load(trained["sde"][0])
    draws = [
        model.draw(
            3,
            torch.Generator().manual_seed(0),
            model.default_sampler(),
            labels=torch.full((3,), c),
            guidance=2.0,
        ).images
        for c in (1, 1, 7)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_run_continues_to_the_same_bits(trained, name, tmp_path, monkeypatch):
    run, command, _ = trained[name]
    original = OpenRun.train

    def stop_early(opened, training):
        stage = training.stage
        forward, calls = stage.forward, []

        def interrupted(*inputs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return forward(*inputs)

        stage.forward = interrupted
        return original(opened, training)

    with monkeypatch.context() as patch:
        patch.setattr(OpenRun, "train", stop_early)
        assert call("train_ncsn", *command, "--out", tmp_path / name).code == 130
    assert not (tmp_path / name / "model.safetensors").exists()
    outcome = call("train_ncsn", *command, "--out", tmp_path / name, "--resume")
    assert outcome.code == 0, outcome.err
    assert "resumed at step 2" in outcome.err
    again = tmp_path / name
    for file in ("model.safetensors", "run.json"):
        assert (again / file).read_bytes() == (run / file).read_bytes(), file
    assert log_lines(again) == log_lines(run)
    a, b = (checkpoint(folder, "step_00000006.pt") for folder in (again, run))
    assert same(a["optimizers"], b["optimizers"]) and same(a["ema"], b["ema"])


def test_likelihood_of_test_images(trained):
    run = trained["sde"][0]
    model, data = lsgm.load(run), build_datasets(load_data_config(run))
    found = ode_data_likelihood(
        model.sde,
        model.score,
        model.pixels,
        data.test.batch(torch.arange(2)),
        divergence=HutchinsonDivergence(),
        t_end=1e-3,
        tolerance=1e-2,
        rng=torch.Generator().manual_seed(0),
    )
    # an untrained model of values in [-1, 1] says more than nothing and less than 8 bits a value
    assert found.num_dims == 256 and (found.bits_per_dim < 14).all() and (found.nats > 0).all()
    torch.testing.assert_close(found.bits_per_dim, found.nats / (256 * math.log(2)))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--score.network", "refinenet", "--kind", "score_sde"), ("refinenet", "score_sde")),
        (
            ("--score.class_conditional", "true", "--score.network", "refinenet"),
            ("takes no class",),
        ),
        (("--sampler.solver", "nonsense"), ("sampler", "unknown solver", "nonsense")),
        (("--kind", "score_sde", "--score.ncsnpp.num_scales", "6"), ("score.ncsnpp", "halved")),
        (("--score.ladder.sigma_min", "3"), ("sigma_min", "below sigma_max")),
    ],
)
def test_mistakes_are_one_line(arguments, parts, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    outcome = call("train_ncsn", "--config", config, *arguments, "--out", tmp_path / "run")
    outcome.error(2, *parts)
    assert not (tmp_path / "run").exists()


def test_a_score_model_is_no_vae(trained, tmp_path):
    run = trained["sde"][0]
    outcome = call("train_lsgm", "--vae", run, "--data.name", "digits", "--out", tmp_path / "x")
    outcome.error(2, "is not the run of a VAE")
