"""Evaluations: which images they take, what their numbers depend on, what they cost and say."""

from __future__ import annotations

import ast
import io
import json
import math
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_toy import (
    NETWORK,
    SPEC,
    TRAIN,
    VAE,
    context,
    datasets,
    evaluate_all,
    join,
    lsgm_model,
    score_model,
    vae,
)
from linear_gaussian import linear_gaussian_lsgm
from PIL import Image
from test_training_distributed import free_port

import lsgm
from lsgm.config.architecture import PriorConfig, SDEConfig
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    ObjectiveConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data import ArrayDataset, Batches, fitting_batch_size, random_subset
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import (
    Estimate,
    evaluation_batches,
    nelbo,
    normal_nelbo,
    ode_nelbo,
)
from lsgm.evaluation.likelihood.decomposition import bound_curves, decompose
from lsgm.evaluation.likelihood.images import data_ode_bound
from lsgm.evaluation.likelihood.importance import iw
from lsgm.evaluation.report.figures import decomposition_plot
from lsgm.likelihood import OdeLogDensity
from lsgm.models import image_likelihood as data_likelihood
from lsgm.sde import VPSDE
from lsgm.system.curves import learning_curves, read_metrics
from lsgm.system.files import RunFolder, atomic_write_json
from lsgm.times import UniformTimes
from lsgm.training import evaluation, logging
from lsgm.training.distributed import World
from lsgm.training.evaluation import evaluate_vae
from lsgm.training.logging import RunLogger
from lsgm.training.runs import latent as runs
from lsgm.training.runs.launch import _fitted
from vae.random import RowGenerators

ALONE = World(torch.device("cpu"))

# Which images


def test_a_part_of_sorted_classes_holds_them_all():
    data = datasets().test
    batches = Batches(data, 7, train=False, limit=40, labels=True)
    found = torch.cat([labels for _, (_, labels) in batches.epoch()])
    counts = Counter(found.tolist())
    assert sum(counts.values()) == 40 and set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) >= 4  # 40 of 120 at random: 10 +- 2.2 a class
    index = evaluation_batches(data, SPEC, limit=40).index
    assert torch.equal(data.labels[index], found)
    # distinct, sorted, the same each time, and a smaller part is part of a larger one
    assert index.unique().tolist() == index.tolist()
    smaller = random_subset(len(data), 15)
    assert set(smaller.tolist()) < set(index.tolist())
    assert not torch.equal(smaller, random_subset(len(data), 15, seed=1))
    whole = torch.arange(len(data))
    assert all(torch.equal(random_subset(len(data), n), whole) for n in (None, 120, 500))


def test_every_part_of_the_data_is_as_likely():
    drawn = torch.cat([random_subset(10, 3, seed=seed) for seed in range(2000)])
    counts = drawn.bincount(minlength=10).double()
    assert ((counts - 600).abs() < 4.5 * math.sqrt(2000 * 0.3 * 0.7)).all()


# What a number depends on

BOUNDS = {
    "vae": lambda batches: nelbo(vae(), batches, samples=2, seed=5),
    "nelbo": lambda batches: nelbo(lsgm_model(), batches, samples=2, seed=5),
    "normal": lambda batches: normal_nelbo(lsgm_model(), batches, seed=5),
    "iw of a vae": lambda batches: iw(vae(), batches, k=3, seed=5),
    "iw": lambda batches: iw(lsgm_model(), batches, k=2, steps=2, calibration=0, seed=5),
    "bits": lambda batches: data_ode_bound(score_model(), batches, seed=5),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_an_images_number_depends_on_seed_and_index_alone(name, monkeypatch):
    def noise(sde, eps_fn, z0, *, divergence, rng, **options):
        # what the solve is given; its steps it shares with the batch, within its tolerance
        value = (z0 * divergence.probe(z0, rng)[0]).flatten(1).sum(1)
        return OdeLogDensity(value, 1, z0, value[None], random=True)

    monkeypatch.setattr(data_likelihood, "ode_log_density", noise)

    def values(size, limit):
        batches = evaluation_batches(datasets().test, SPEC, batch_size=size, limit=limit)
        found = BOUNDS[name](batches).per_image
        return dict(zip(batches.index.tolist(), found.tolist(), strict=True))

    whole, parts = values(100, 10), values(3, 10)
    few = values(2, 4)
    assert few.keys() < whole.keys() == parts.keys()
    for found in (parts, few):
        for image, value in found.items():
            assert value == pytest.approx(whole[image], rel=1e-5, abs=1e-3), image
    # yet every image has noise of its own
    same = evaluation_batches(ArrayDataset(datasets().test.images[:1].repeat(4, 1, 1, 1)), SPEC)
    assert BOUNDS[name](same).per_image.unique().numel() == 4


def test_an_images_ode_bound_depends_on_seed_and_index_alone():
    model = linear_gaussian_lsgm(VPSDE())
    x, _ = model.vae.images(6)
    found = [
        ode_nelbo(model, batches, tolerance=1e-6, check_images=5, seed=5)
        for batches in ([x], [x[:2], x[2:5], x[5:]])
    ]
    torch.testing.assert_close(found[0].per_image, found[1].per_image, rtol=0, atol=1e-3)
    changes = [report.settings["tolerance_change"] for report in found]
    assert changes[0] == pytest.approx(changes[1], rel=0.05) and changes[0] > 0


def test_the_parts_of_the_report_depend_on_seed_and_index_alone():
    def batches(size):
        return evaluation_batches(datasets().test, SPEC, batch_size=size, limit=9)

    model = lsgm_model()
    first, second = (decompose(model, batches(size), seed=2) for size in (9, 2))
    for a, b in zip(first.terms, second.terms, strict=True):
        assert a.nats.mean == pytest.approx(b.nats.mean, rel=1e-5, abs=1e-3)
    first, second = (bound_curves(model, batches(n), k=(1, 2), steps=2) for n in (9, 2))
    for a, b in zip(first, second, strict=True):
        assert a.num_images == b.num_images == 9
        means = [[e.mean for e in curve.nats] for curve in (a, b)]
        assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_stratified_times_belong_to_images_and_are_spread_evenly():
    times = UniformTimes(0.0)

    def draw(rows, seed=1):
        rng = RowGenerators.of(seed, rows)
        return torch.stack([times.sample(len(rows), rng, stratified=True).t for _ in range(2)])

    whole = draw(range(500))
    assert torch.equal(whole[:, 100:137], draw(range(100, 137)))
    assert torch.equal(whole[:, [3, 400, 77]], draw([3, 400, 77]))
    # the steps of the golden-section sequence: at most three lengths, none above 2 / N
    for row in whole:
        assert row.sort().values.diff().max() < 2 / 500
    assert (whole[0] - whole[1]).abs().min() > 1e-3
    # each time is uniform
    shifts = torch.stack([draw([7], seed)[0] for seed in range(400)]).flatten()
    expected = (torch.arange(400) + 0.5) / 400
    assert (shifts.sort().values - expected).abs().max() < 1.6 / math.sqrt(400)


def test_processes_share_the_evaluation_and_find_what_one_finds(tmp_path):
    """The main process may also work alone for longer than a training step may take."""
    port, size = str(free_port()), 2
    out = tmp_path / "two"
    out.mkdir()
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["evaluation_toy"])
    processes = [
        server.Process(target=join, args=(out, common | {"RANK": rank, "LOCAL_RANK": rank}))
        for rank in ("0", "1")
    ]
    for process in processes:
        process.start()
    one = evaluate_all(ALONE, tmp_path / "one")
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    two = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(size)]
    assert one.pop("batch") == 8 and [found.pop("batch") for found in two] == [4, 4]
    shown = evaluation.RECONSTRUCTIONS
    assert one.pop("images") == TRAIN.eval_images + shown
    images = [found.pop("images") for found in two]
    assert sum(images) == TRAIN.eval_images + shown and abs(images[0] - images[1]) < 5
    for found in two:
        assert found.keys() == one.keys()
        for name, numbers in one.items():
            assert found[name] == pytest.approx(numbers, rel=1e-5), name
    for grid in ("samples", "reconstructions"):
        a, b = (
            Image.open(tmp_path / n / "samples" / f"{grid}_00000001.png") for n in ("one", "two")
        )
        assert a.size == b.size
    assert not list((tmp_path / "two" / "samples").glob("*.tmp"))


# What it costs


@pytest.mark.parametrize(("accumulate", "size"), [(1, 6), (3, 2)])
def test_no_batch_is_larger_than_that_of_a_training_step(tmp_path, accumulate, size):
    train = replace(TRAIN, batch_size=6, accumulate=accumulate, precision="bf16", eval_images=7)
    model, seen = vae(), []

    def watch(module, inputs):
        seen.append((len(inputs[0]), torch.is_autocast_enabled("cpu")))

    model.vae.encoder.register_forward_pre_hook(watch)
    decoded = []
    original = model.vae.decode
    model.vae.decode = lambda eps: decoded.append(len(eps[0])) or original(eps)
    (tmp_path / "samples").mkdir()
    found = evaluate_vae(model, datasets(), DataConfig(), context(ALONE, tmp_path, train))
    assert max(number for number, _ in seen) == max(decoded) == size
    assert all(autocast for _, autocast in seen) and sum(decoded) == evaluation.SAMPLES
    assert math.isfinite(found["nelbo"])


def test_long_evaluations_say_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "SILENCE", 0.0)
    stream = io.StringIO()
    with RunLogger(RunFolder(tmp_path), 10, stream=stream).bar("test images", 6) as done:
        done(4)
        done(2)
    assert stream.getvalue().splitlines() == ["test images: 4 of 6", "test images: 6 of 6"]
    stream = io.StringIO()
    with RunLogger(RunFolder(tmp_path), 10, enabled=False, stream=stream).bar("x", 6) as done:
        done(6)
    assert stream.getvalue() == ""


def test_a_batch_is_as_large_as_the_data_at_most(capsys):
    assert [fitting_batch_size(b, 10, 4) for b in (4, 8, 12, 64)] == [4, 8, 8, 8]
    train = TrainConfig(batch_size=64, accumulate=4)
    assert _fitted(train, 10, ALONE) == replace(train, batch_size=8)
    assert "64 is more than the 10 training images; taking 8" in capsys.readouterr().out
    assert _fitted(train, 64, ALONE) == train and capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"3 training images are too few for .*accumulate 4"):
        _fitted(train, 3, ALONE)


# What it says


def test_one_image_has_no_standard_error(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    place = context(ALONE, tmp_path, replace(TRAIN, eval_images=1))
    assert evaluate_vae(vae(), datasets(), DataConfig(), place)["nelbo_standard_error"] is None
    place = context(ALONE, tmp_path, replace(TRAIN, eval_images=2))
    assert evaluate_vae(vae(), datasets(), DataConfig(), place)["nelbo_standard_error"] > 0
    assert str(Estimate.of(torch.tensor([3.0]))) == "3.00 +- n/a"
    assert str(Estimate.of(torch.tensor([3.0, 5.0]))) == "4.00 +- 1.00"
    import matplotlib.axes

    texts = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "text", lambda self, x, y, text, **kwargs: texts.append(text)
    )
    decomposition_plot(["a", "b"], [2.0, 1.0], [math.nan, 0.5], tmp_path / "parts.png")
    assert texts == ["2.00", "1.00 ± 0.50"]


def test_a_run_on_few_colour_images_says_what_its_user_understands(tmp_path, capsys, monkeypatch):
    """Its batch is larger than its data, and its last evaluation is in the learning curve."""
    pictures = tmp_path / "data"
    for split, count in (("train", 10), ("test", 3)):
        for i in range(count):
            path = pictures / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(path)
    drawn = []

    def curves(lines, path, **options):
        drawn.append((lines, options))
        learning_curves(lines, path, **options)

    monkeypatch.setattr(runs, "learning_curves", curves)
    data = DataConfig("folder", root=str(pictures), image_size=8)
    train = TrainConfig(
        batch_size=64, accumulate=2, epochs=3, eval_every=2, log_every=1, eval_images=1,
        device="cpu",
    )  # fmt: skip
    first = runs.train_vae(VAETrainConfig(data=data, vae=VAE, train=train), str(tmp_path / "vae"))
    prior = PriorConfig(NETWORK, SDEConfig("vesde"), mixing_init=-2.0, drop_inactive=True)
    config = LSGMTrainConfig(
        vae_run=str(first), data=data, prior=prior, objective=ObjectiveConfig(), train=train
    )
    run = runs.train_lsgm(config, str(tmp_path / "lsgm"))
    said = capsys.readouterr()
    line = "train.batch_size: 64 is more than the 10 training images; taking 10"
    assert said.out.splitlines().count(line) == 2
    progress = [text for text in said.err.splitlines() if text.startswith("step ")]
    assert len(progress) == 6
    for text in progress:
        assert "  nelbo " in text and "  bits_per_dim " in text and "loss" not in text
    results = [text for text in said.err.splitlines() if text.startswith("evaluation at step")]
    assert len(results) == 4
    for text in results:
        assert "bits_per_dim" in text and "standard_error n/a" in text and text.endswith(" s)")
    log = read_metrics(run / "metrics.jsonl")
    for record in log:
        nats = record["bits_per_dim"] * 192 * math.log(2)
        assert record["nelbo"] == pytest.approx(nats, rel=1e-5)
    assert all("loss" not in record for record in log) and "surrogate" in log[0]
    evaluated = [record for record in log if record["phase"] == "eval"]
    assert [r["step"] for r in evaluated] == [2, 3] and all(
        r["eval_seconds"] > 0 for r in evaluated
    )
    lines, options = drawn[-1]
    assert lines["lsgm"] == log and options["num_dims"] == 192
    assert isinstance(lsgm.load(run), lsgm.models.latent.LSGM)


def test_curves_of_colour_data_have_an_axis_of_bits(tmp_path, monkeypatch):
    import matplotlib.figure

    seen = []
    original = matplotlib.figure.Figure.savefig

    def keep(self, *args, **kwargs):
        seen.append(self.axes[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    lines = [{"phase": "eval", "train_seconds": 60.0 * i, "nelbo": 500.0 - i} for i in range(3)]
    learning_curves({"run": lines}, tmp_path / "a.png", num_dims=192)
    learning_curves({"run": lines}, tmp_path / "b.png")
    with_bits, without = seen
    (axis,) = with_bits.child_axes
    assert with_bits.get_ylabel() == "bits/dim" and not without.child_axes
    assert axis.get_ylabel() == without.get_ylabel() == "NELBO, nats an image"
    unit = 192 * math.log(2)
    assert axis.get_ylim() == pytest.approx([y * unit for y in with_bits.get_ylim()])
    assert with_bits.lines[0].get_ydata() == pytest.approx([(500 - i) / unit for i in range(3)])


# Files


def test_json_never_holds_nan(tmp_path):
    value = {"a": [1.0, math.nan], "b": {"c": -math.inf, "d": (2, "x", None)}}
    path = tmp_path / "report.json"
    with pytest.warns(UserWarning, match=r"written as null: a\.1 \(nan\), b\.c \(-inf\)"):
        atomic_write_json(path, value)

    def refuse(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": [1.0, None], "b": {"c": None, "d": [2, "x", None]}}


def test_all_json_is_written_by_one_function():
    package = Path(lsgm.__file__).parent
    writers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    }
    # The others hold no numbers that could be NaN: what is hashed, who holds a lock, headers.
    system = ("files", "integrity", "locks", "safetensors")
    assert writers == {f"system/{name}.py" for name in system}
