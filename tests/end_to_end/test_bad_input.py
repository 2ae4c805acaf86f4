"""What a user can get wrong: one line that says what, exit code 2, and nothing lost.

A full disk is exit code 1; the checkpoint before is good.
"""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from tiny import (
    CANNOT_MOUNT,
    LAST_CHECKPOINT,
    STEPS,
    ScriptProcess,
    assert_same_runs,
    call,
    checkpoint,
)

from lsgm.training.checkpoint import Checkpoints

SAMPLING = ("--n", 2, "--device", "cpu")
WEIGHTS, DESCRIPTION = "model.safetensors", "run.json"


def truncate(path, part=0.5):
    os.truncate(path, int(path.stat().st_size * part))


@pytest.fixture
def copy_of(tiny, tmp_path):
    """Copies of the tiny runs, to be damaged."""
    return lambda stage: shutil.copytree(tiny.run(stage), tmp_path / f"copy-{stage}")


@pytest.fixture
def train_vae(tiny, tmp_path):
    """The first stage in a fresh folder, with more arguments."""
    return lambda *arguments: call(*tiny.command("vae", tmp_path / "run"), *arguments)


# Configurations


def test_a_missing_configuration():
    call("train_vae", "--config", "nowhere/x.yaml").error(2, "nowhere/x.yaml", "no such")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim_vae:\n  learning_rate: 1.0\n", ("optim_vae.learning_rate", "x.yaml")),
        ("optim_vae:\n  lr: fast\n", ("optim_vae.lr", "'fast'", "a number", "x.yaml")),
        ("vae:\n  channel_mult: 3\n", ("vae.channel_mult", "x.yaml")),
        ("vae:\n  num_latent_scales: 2\n", ("vae.channel_mult", "3 positive values", "x.yaml")),
        ("train:\n  batch_size: 0\n", ("train.batch_size", "positive", "x.yaml")),
        ("train: [\n", ("x.yaml", "not valid YAML")),
        ("- 1\n", ("x.yaml",)),
    ],
    ids=["unknown key", "text", "no list", "misfit", "zero", "no YAML", "no mapping"],
)
def test_a_wrong_configuration(tmp_path, text, parts):
    (tmp_path / "x.yaml").write_text(text)
    outcome = call("train_vae", "--config", tmp_path / "x.yaml", "--out", tmp_path / "run")
    outcome.error(2, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--optim_vae.lrr", "1"), ("--optim_vae.lrr", "--optim_vae.lr?")),
        (("--train.batch_size", "many"), ("--train.batch_size", "'many'", "a whole number")),
        (("--train.device", "gpu"), ("device", "gpu")),
        (("--vae.decoder_dist", "dml"), ("vae.decoder_dist", "binary", "use bin")),
        (("--vae.num_preprocess_blocks", "5", "--vae.channel_mult", *"111111"),
         ("vae.num_preprocess_blocks", "16")),
        (("--resume",), ("holds no run", "--resume")),
        (("stray",), ("stray",)),
    ],
)  # fmt: skip
def test_a_wrong_command_line(train_vae, tmp_path, arguments, parts):
    train_vae(*arguments).error(2, *parts)
    assert not (tmp_path / "run").exists()  # it would be in the way of the next try


def test_a_run_is_not_overwritten(tiny):
    before = (tiny.vae / WEIGHTS).read_bytes()
    call(*tiny.command("vae", tiny.vae)).error(2, str(tiny.vae), "--resume", "--out")
    assert (tiny.vae / WEIGHTS).read_bytes() == before


# Data


def test_arrays_of_another_shape(train_vae, tmp_path):
    savemat(tmp_path / "chardata.mat", {"data": np.zeros((10, 5)), "testdata": np.zeros((784, 5))})
    outcome = train_vae("--data.name", "omniglot", "--data.root", tmp_path)
    outcome.error(2, "chardata.mat", "'data'", "(10, 5)", "784")


def folder_options(root):
    return (
        "--data.name", "folder", "--data.root", root, "--data.image_size", 16,
        "--data.augment", "none", "--vae.decoder_dist", "dml", "--train.batch_size", 4,
    )  # fmt: skip


def test_image_folders(train_vae, tmp_path):
    images = tmp_path / "images"
    train_vae(*folder_options(images)).error(2, "data.root", str(images))
    images.mkdir()
    train_vae(*folder_options(images)).error(2, "data.root", "no image", str(images))
    generator = np.random.default_rng(0)
    for number in range(10):
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    train_vae(*folder_options(images), "--vae.decoder_dist", "bin").error(2, "decoder_dist")
    for path in images.iterdir():
        if path.name != "0.png":
            truncate(path)
    train_vae(*folder_options(images)).error(2, str(images), "not a readable image")


def test_a_damaged_test_image_shows_before_the_work(train_vae, tmp_path):
    images, generator = tmp_path / "images", np.random.default_rng(0)
    for name in [*(f"train/{i}.png" for i in range(8)), "test/a.png", "test/.hidden.png"]:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    truncate(images / "test" / "a.png")
    outcome = train_vae(*folder_options(images))
    outcome.error(2, "test/a.png: not a readable image")
    assert outcome.out == ""  # it is found as the folder is packed
    assert not (tmp_path / "run").exists()


# The run below a second stage


def test_a_wrong_first_stage(tiny, tmp_path):
    config = ("--config", tiny.configs / "tiny-lsgm.yaml", "--out", tmp_path / "run")
    call("train_lsgm", *config).error(2, "--vae", "runs/vae")
    call("train_lsgm", *config, "--vae", tmp_path / "none").error(2, str(tmp_path / "none"))
    (tmp_path / "other").mkdir()
    call("train_lsgm", *config, "--vae", tmp_path / "other").error(2, str(tmp_path / "other"))
    call("train_lsgm", *config, "--vae", tiny.lsgm).error(2, str(tiny.lsgm), "LSGM")
    outcome = call("train_lsgm", *config, "--vae", tiny.lsgm, "--data.name", "digits")
    outcome.error(2, "--vae", str(tiny.lsgm))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_first_stage(tiny, copy_of, tmp_path):
    run = copy_of("vae")
    (run / DESCRIPTION).unlink()
    config = ("--config", tiny.configs / "tiny-lsgm.yaml", "--out", tmp_path / "run")
    call("train_lsgm", *config, "--vae", run).error(2, str(run), "not finished", "--resume")


# Checkpoints


@pytest.mark.parametrize(
    ("stage", "key", "old", "new"),
    [
        ("vae", "vae.num_channels_enc", "8", "16"),
        ("vae", "optim_vae.optimizer", "adamax", "adam"),
        ("vae", "optim_vae.ema_decay", "0.9", "0.0"),
        ("vae", "data.augment", "affine", "none"),
        ("vae", "train.seed", "0", "1"),
        ("lsgm", "prior.network.num_channels", "16", "8"),
    ],
)
def test_what_a_run_was_begun_with_cannot_change(tiny, stage, key, old, new):
    run = tiny.run(stage)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    outcome = call(*tiny.command(stage, run), "--resume", f"--{key}", new)
    outcome.error(2, f"{key}: {run} was begun with {old}, which cannot become {new}")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_truncated_checkpoint_gives_way_to_the_one_before(tiny, copy_of):
    run = copy_of("vae")
    truncate(run / "checkpoints" / LAST_CHECKPOINT)
    (run / WEIGHTS).unlink()
    outcome = call(*tiny.command("vae", run), "--resume")
    assert outcome.code == 0, outcome.err
    warning, resumed, *_ = outcome.err.splitlines()
    assert warning.startswith("warning: ") and f"{LAST_CHECKPOINT} is damaged" in warning
    assert "step_00000010.pt" in warning and resumed == f"resumed at step 10 of {STEPS}"
    assert_same_runs(run, tiny.vae)


def test_truncated_checkpoints_only(tiny, copy_of):
    run = copy_of("vae")
    (run / WEIGHTS).unlink()
    for path in (run / "checkpoints").iterdir():
        truncate(path, 0.9)
    outcome = call(*tiny.command("vae", run), "--resume")
    outcome.error(2, "no checkpoint can be used", "step_00000000.pt", LAST_CHECKPOINT)


# Released files


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_weights(copy_of, tmp_path, part):
    run = copy_of("lsgm")
    truncate(run / WEIGHTS, part)
    call("sample", "--run", run, *SAMPLING, "--out", tmp_path / "x.png").error(2, WEIGHTS)
    assert not (tmp_path / "x.png").exists()


def test_weights_of_another_run(tiny, copy_of, tmp_path):
    run = copy_of("lsgm")
    shutil.copy(tiny.vae / WEIGHTS, run / WEIGHTS)
    call("sample", "--run", run, *SAMPLING).error(2, WEIGHTS, DESCRIPTION, "sha256")
    description = json.loads((run / DESCRIPTION).read_text())
    (run / DESCRIPTION).write_text(json.dumps(unsealed(description)))
    call("sample", "--run", run, *SAMPLING).error(2, WEIGHTS, DESCRIPTION, "score.")


def unsealed(description):
    return {key: value for key, value in description.items() if key != "sha256"}


def _without(*keys):
    def change(description):
        section = description
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]
        return json.dumps(description).encode()

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda description: b"",
        lambda description: json.dumps(description).encode()[:200],
        lambda description: b"\xff\xfe\x00",
        lambda description: b"[1, 2]",
        lambda description: b"{}",
        lambda description: json.dumps(description | {"vae": 3}).encode(),
        lambda description: json.dumps(description | {"kind": "gan"}).encode(),
        lambda description: json.dumps(description | {"data": {"colour": 3}}).encode(),
        _without("data"),
        _without("spec", "channels"),
        _without("prior", "sde"),
    ],
    ids=[
        "empty",
        "cut",
        "bytes",
        "list",
        "nothing",
        "number",
        "kind",
        "key",
        "data",
        "spec",
        "sde",
    ],
)
def test_a_damaged_description(copy_of, damage):
    run = copy_of("lsgm")
    description = json.loads((run / DESCRIPTION).read_text())
    (run / DESCRIPTION).write_bytes(damage(unsealed(description)))
    call("evaluate", "--run", run, "--limit", 4, "--device", "cpu").error(2, DESCRIPTION)


# Sampling and evaluation


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--solver", "magic"), ("--solver", "magic", "heun")),
        (("--solver", "heun", "--nfe", "1"), ("heun", "1")),
        (("--solver", "heun", "--grid", "magic"), ("magic",)),
        (("--nfe", "0"), ("nfe", "positive")),
        (("--nfe", "few"), ("--nfe", "'few'", "a whole number")),
        (("--n", "0"), ("n:", "positive")),
        (("--t_end", "1.5"), ("t_end",)),
        (("--out", "images.jpg"), ("out", ".png or .npz")),
        (("--device", "gpu"), ("gpu",)),
        (("--temprature", "1"), ("--temprature", "--temperature?")),
    ],
)
def test_wrong_samplers(tiny, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    call("sample", "--run", tiny.lsgm, *SAMPLING, *arguments).error(2, *parts)
    assert not list(tmp_path.iterdir())


def test_wrong_evaluations(tiny, tmp_path):
    call("sample").error(2, "--run")
    call("evaluate").error(2, "--run")
    call("sample", "--run", tmp_path / "none").error(2, str(tmp_path / "none"), "no such")
    call("evaluate", "--run", tmp_path, "--device", "cpu").error(2, str(tmp_path), "not a run")
    evaluate = ("evaluate", "--run", tiny.vae, "--limit", 4, "--device", "cpu")
    call(*evaluate, "--metrics", "magic").error(2, "--metrics", "magic", "nelbo, normal, iw, ode")
    call(*evaluate, "--k", "0").error(2, "k:", "positive")
    call(*evaluate, "--split", "validation").error(2, "split", "test or train")


# A full disk


def test_a_full_disk_leaves_the_checkpoint_before(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    original = os.fsync

    def fsync(handle):
        if (out / "checkpoints" / "step_00000005.pt").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        outcome = call(*tiny.command("vae", out))
    outcome.error(1, "no space left", "step_00000005.pt is intact", "--resume", log=True)
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step_00000000.pt", "step_00000005.pt"]
    assert checkpoint(out, "step_00000005.pt")["step"] == 5
    outcome = call(*tiny.command("vae", out), "--resume")
    assert outcome.code == 0, outcome.err
    assert_same_runs(out, tiny.vae)


def test_a_disk_that_really_is_full(tiny, tmp_path):
    size = (tiny.vae / "checkpoints" / LAST_CHECKPOINT).stat().st_size
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    command = tiny.command("vae", disk / "run")
    process = ScriptProcess(command, tmp_path / "log", disk=(disk, 2 * size, kept))
    code = process.wait()
    if code == CANNOT_MOUNT:
        pytest.skip("this system does not let a process mount a file system of its own")
    *_, last = (tmp_path / "log").read_text().splitlines()
    assert code == 1 and last.startswith("error: no space left"), (tmp_path / "log").read_text()
    assert "is intact" in last
    assert "Traceback" not in (tmp_path / "log").read_text()
    step, _ = Checkpoints(kept / "run" / "checkpoints").latest(pytest.fail)
    assert step > 0 and not list(kept.rglob("*.tmp"))
    outcome = call(*tiny.command("vae", kept / "run"), "--resume")
    assert outcome.code == 0, outcome.err
    assert_same_runs(kept / "run", tiny.vae)


# What the system refuses


def test_outputs_are_checked_before_the_work(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")

    def work(*arguments):
        pytest.fail("the work began")

    monkeypatch.setattr("lsgm.commands.sample.iterate_samples", work)
    monkeypatch.setattr("lsgm.evaluation.report.evaluate.evaluate_run", work)
    below, folder, long = tmp_path / "file" / "x.png", tmp_path / "f.png", f"{'x' * 300}.png"
    folder.mkdir()
    for out, reason in ((below, "in the way"), (folder, "a folder"), (long, "too long")):
        sample = ("sample", "--run", tiny.vae, *SAMPLING, "--out")
        call(*sample, out).error(2, reason)
    evaluate = ("evaluate", "--run", tiny.vae, "--device", "cpu")
    for option in ("--json", "--pictures", "--out"):
        call(*evaluate, option, below).error(2, str(tmp_path / "file"), "in the way")
    call("edit", "reconstruct", "--run", tiny.vae, "--out", below).error(2, "in the way")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.png", "file"]


def test_a_run_below_a_file_or_with_a_long_name(train_vae, tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    for out, reason in (("file/run", "in the way"), ("x" * 300, "too long")):
        call(*tiny.command("vae", tmp_path / out)).error(2, str(tmp_path / out), reason)
    train_vae("--name", "a\0b", "--resume").error(2, "holds no run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_removed_under_a_run(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    original = Checkpoints.save

    def save(self, step, state):
        if step == 5:
            shutil.rmtree(out)
        return original(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", save)
    outcome = call(*tiny.command("vae", out))
    outcome.error(1, "step_00000005.pt: No such file or directory", log=True)


def test_links_to_another_run_leave_it_as_it_is(tiny, tmp_path):
    """A run folder copied as links goes on by itself."""
    out = tmp_path / "run"
    shutil.copytree(tiny.vae, out, copy_function=os.symlink)
    before = {p: p.read_bytes() for p in tiny.vae.rglob("*") if p.is_file()}
    outcome = call("train_vae", "--out", out, "--resume", "--train.max_steps", STEPS + 1)
    assert outcome.code == 0, outcome.err
    assert before == {p: p.read_bytes() for p in tiny.vae.rglob("*") if p.is_file()}
    assert checkpoint(out, f"step_{STEPS + 1:08d}.pt")["step"] == STEPS + 1
