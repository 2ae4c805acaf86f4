"""From nothing to numbers and pictures, by the scripts alone."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import STEPS, call, checkpoint, log_lines, same

import lsgm
from lsgm.data import build_datasets
from lsgm.evaluation.likelihood.bounds import evaluation_batches, nelbo
from lsgm.models.latent import LSGM, VAEModel
from lsgm.models.release import load_data_config

EVALUATION = (
    "--metrics nelbo iw ode --limit 8 --k 3 --batch_size 8 --tolerance 1e-2 --device cpu "
    "--sampling.solver heun --sampling.nfe 4 --sampling.batch_size 4"
).split()
SAMPLING = "--n 6 --batch_size 4 --device cpu".split()
SOLVER = "--solver heun --nfe 4".split()


def held_out(run, model, limit):
    datasets = build_datasets(load_data_config(run))
    return evaluation_batches(datasets.test, model.spec, limit=limit)


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
def test_a_run_folder_holds_everything(tiny, stage):
    run = tiny.run(stage)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "model.safetensors", "run.json", "curves.png"}
    assert any(name.startswith("events") for name in names)
    checkpoints = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert checkpoints == [f"step_{step:08d}.pt" for step in (0, 5, 10, STEPS)]
    pictures = {path.name for path in (run / "samples").iterdir()}
    assert pictures == {f"{kind}_{STEPS:08d}.png" for kind in ("samples", "reconstructions")}
    assert not list(run.rglob("*.tmp"))
    assert json.loads((run / "run.json").read_text())["kind"] == stage
    lines = log_lines(run)
    trained = [line for line in lines if line["phase"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert (lines[-1]["phase"], lines[-1]["step"]) == ("eval", STEPS)
    assert trained[-1]["nelbo"] < 0.9 * trained[0]["nelbo"] or stage == "lsgm"


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
def test_load_gives_the_model_that_was_trained(tiny, stage):
    run, trained = tiny.run(stage), tiny.models[stage]
    loaded = lsgm.load(run)
    assert type(loaded) is {"vae": VAEModel, "lsgm": LSGM}[stage] and not loaded.training
    assert same(dict(loaded.state_dict()), dict(trained.state_dict()))
    reports = [nelbo(m, held_out(run, m, 32), seed=0) for m in (loaded, trained)]
    # Memory layouts differ, so sums are rounded differently.
    torch.testing.assert_close(*(r.per_image for r in reports), rtol=1e-5, atol=1e-3)
    assert reports[0].nats.mean == pytest.approx(log_lines(run)[-1]["nelbo"], rel=1e-5)


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
def test_released_weights_are_the_averages(tiny, stage):
    released = load_file(tiny.run(stage) / "model.safetensors")
    for side, ema in checkpoint(tiny.run(stage))["ema"].items():
        prefix = {"vae": "vae.", "prior": "score."}[side]
        average = {k.removeprefix("module."): v for k, v in ema.items()}
        part = {k.removeprefix(prefix): v for k, v in released.items() if k.startswith(prefix)}
        assert part.keys() == average.keys() - {"n_averaged"}
        assert all(torch.equal(part[name], average[name]) for name in part)


def test_evaluation_writes_table_json_and_pictures(tiny, tmp_path):
    report, pictures = tmp_path / "reports" / "all.json", tmp_path / "pictures"
    outcome = call(
        "evaluate", "--run", tiny.vae, tiny.lsgm, *EVALUATION, "--json", report,
        "--pictures", pictures,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in outcome.out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["vae", "vae", "lsgm", "lsgm", "lsgm"]
    assert len({len(row) for row in rows}) == 1
    first, second = json.loads(report.read_text())
    assert (first["kind"], second["kind"]) == ("vae", "lsgm")
    assert {"nelbo", "iw"} <= first.keys() and "ode" not in first
    assert {"nelbo", "iw", "ode"} <= second.keys()
    bounds = [first["nelbo"], first["iw"], second["nelbo"], second["iw"], second["ode"]]
    for row, bound in zip(rows[2:], bounds, strict=True):
        mean, error = bound["nats"]["mean"], bound["nats"]["standard_error"]
        assert row[3] == f"{mean:.2f} +- {error:.2f}" and int(row[2]) == bound["num_images"] == 8
        assert bound["bits_per_dim"] == pytest.approx(mean / (256 * math.log(2)))
        if bound["kl"] is not None:
            assert mean == pytest.approx(bound["reconstruction"]["mean"] + bound["kl"]["mean"])
    for run, found in ((tiny.vae, first), (tiny.lsgm, second)):
        model = lsgm.load(run)
        direct = nelbo(model, held_out(run, model, 8), seed=0)
        assert found["nelbo"]["nats"]["mean"] == pytest.approx(direct.nats.mean, rel=1e-6)
        for name in ("samples", "reconstructions", "learning_curve"):
            with Image.open(pictures / run.name / f"{name}.png") as image:
                image.load()
    assert (pictures / "learning_curves.png").stat().st_size > 0


@pytest.mark.parametrize("stage", ["vae", "lsgm"])
def test_samples_are_fixed_by_the_seed(tiny, tmp_path, stage):
    def draw(name, seed):
        solver = SOLVER if stage == "lsgm" else ()  # a VAE has nothing to solve
        options = (*SAMPLING, *solver, "--seed", seed, "--out", tmp_path / name)
        outcome = call("sample", "--run", tiny.run(stage), *options)
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    a, b, c = (np.load(draw(f"{n}.npz", s))["images"] for n, s in (("a", 3), ("b", 3), ("c", 4)))
    assert a.shape == (6, 1, 16, 16) and a.min() >= 0 and a.max() <= 1
    assert np.array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    assert len({image.tobytes() for image in a}) == 6
    with Image.open(draw("grid.png", 3)) as image:
        grid = np.asarray(image.convert("L")).astype(float) / 255
    # Two columns of images with a border of one pixel, everything twice as large.
    tiles = [
        grid[2 * y : 2 * (y + 16) : 2, 2 * x : 2 * (x + 16) : 2]
        for y in (1, 18, 35)
        for x in (1, 18)
    ]
    assert np.abs(np.stack(tiles) - a[:, 0]).max() < 1 / 255


def test_a_frozen_vae_stays_as_it_is(tiny, tmp_path):
    out = tmp_path / "frozen"
    outcome = call(
        *tiny.command("lsgm", out), "--prior.training", "frozen", "--train.max_steps", 3,
        "--objective.spectral_regularization", "0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    before = load_file(tiny.vae / "model.safetensors")
    after = load_file(out / "model.safetensors")
    first, last = (checkpoint(out, f"step_{step:08d}.pt")["weights"] for step in (0, 3))
    assert any("running_mean" in name for name in before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert torch.equal(last[f"model.{name}"], value), name
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert moved and all(name.startswith("model.score.") for name in moved)
