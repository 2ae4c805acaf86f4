"""Runs small enough for a test, and ways to start the scripts: in this process, or in one of their
own.

Processes come from a fork server that has imported the package once, so that a killed run costs no
second import.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
from killing import kill_at

REPOSITORY = Path(__file__).parents[2]
STEPS = 14
STEPS_PER_EPOCH = 11  # 1,438 images in batches of 128: the run ends in its second epoch
LAST_CHECKPOINT = f"step_{STEPS:08d}.pt"
CANNOT_MOUNT = 77
KILLS = int(os.environ.get("LSGM_KILLS", "6"))
"""How often the kill tests kill a run."""
CLOCKS = ("time", "train_seconds", "eval_seconds", "images_per_second", "crc32")

TRAIN = f"""
train:
  epochs: 2
  max_steps: {STEPS}
  batch_size: 128
  log_every: 1
  eval_every: 100
  eval_images: 32
  checkpoint_every: 5
  keep_checkpoints: 10
  device: cpu
  num_threads: 1
"""

VAE_CONFIG = (
    """
name: tiny-vae
data:
  name: digits
  augment: affine
vae:
  num_channels_enc: 8
  num_channels_dec: 8
  channel_mult: [1, 2]
  num_preprocess_blocks: 1
  num_preprocess_cells: 1
  num_postprocess_cells: 1
  num_latent_scales: 1
  num_groups_per_scale: 2
  num_latent_per_group: 2
  cell: res_bnswish
objective:
  kl_anneal_portion: 0.8
  kl_const_coeff: 0.1
  spectral_regularization: 1.0e-2
optim_vae:
  lr: 1.0e-2
  warmup_steps: 2
  clip_norm: 200.0
  ema_decay: 0.9
"""
    + TRAIN
)

LSGM_CONFIG = (
    """
name: tiny-lsgm
prior:
  network:
    num_channels: 16
    num_scales: 2
    num_cells_per_scale: 1
    embedding_dim: 16
  mixing_init: -2.0
objective:
  kl_const_coeff: 0.7
  kl_anneal_portion: 0.8
  spectral_regularization: 1.0e-2
optim_vae:
  lr: 3.0e-3
  warmup_steps: 2
  clip_norm: 200.0
  ema_decay: 0.9
optim_prior:
  optimizer: adamw
  lr: 1.0e-3
  lr_min: 1.0e-4
  eps: 1.0e-4
  warmup_steps: 2
  clip_norm: 200.0
  ema_decay: 0.9
"""
    + TRAIN
)


@dataclass(frozen=True)
class TinyRuns:
    """A finished run of each stage, and the models that their trainings held in memory at the
    end.
    """

    configs: Path
    vae: Path
    lsgm: Path
    models: dict[str, torch.nn.Module]

    def command(self, stage: str, out: Path) -> tuple[str, ...]:
        """Script and arguments that train the stage into `out` like the run here."""
        source = ("--vae", str(self.vae)) if stage == "lsgm" else ()
        return (
            f"train_{stage}",
            "--config",
            str(self.configs / f"tiny-{stage}.yaml"),
            *source,
            "--out",
            str(out),
        )

    def run(self, stage: str) -> Path:
        return self.lsgm if stage == "lsgm" else self.vae


@dataclass(frozen=True)
class Outcome:
    """What a script did: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    def error(self, code: int, *parts: str, log: bool = False) -> None:
        """Check that the script ended with this code and one line, the only one unless it has a
        log, that contains the parts.
        """
        assert self.code == code, self.err
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:], self.err
        assert log or len(lines) == 1, self.err
        assert "Traceback" not in self.err
        for part in parts:
            assert part in lines[-1], f"{part!r} is not in {lines[-1]!r}"


def script_path(name: str) -> Path:
    return REPOSITORY / "scripts" / f"{name}.py"


def call(name: str, *arguments: object) -> Outcome:
    """Run a script of this name in this process, as the command line would."""
    out, err = io.StringIO(), io.StringIO()
    argv = [str(script_path(name)), *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(argv[0], run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, out.getvalue(), err.getvalue())


class ScriptProcess:
    """A script in a process of its own.

    Args:
        command: Name of the script and its arguments.
        log: File that takes what it prints.
        environment: Variables to set.
        disk: Folder to cover by a file system of so many bytes that only this process sees, and
            where to copy that file system at the end. The exit code is CANNOT_MOUNT where the
            system does not allow it.
        signal_at: Moment (:func:`killing.kill_at`) and signal that the process sends to itself.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        log: Path,
        environment: dict[str, str] | None = None,
        disk: tuple[Path, int, Path] | None = None,
        signal_at: tuple[int, int] | None = None,
    ) -> None:
        self.log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lsgm.training.runs.latent"])
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        with mock.patch.dict(os.environ, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
            forkserver.ensure_running()
        self._process = context.Process(
            target=_be_script, args=(command, log, environment or {}, disk, signal_at)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_step(self, run: Path, step: int, seconds: float = 300.0) -> None:
        """Return as soon as the run's log shows that many steps."""
        metrics, end = run / "metrics.jsonl", time.monotonic() + seconds
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
            assert self._process.is_alive(), self.log.read_text()
            assert time.monotonic() < end, "the run is too slow"
            time.sleep(0.002)

    def wait(self, seconds: float = 300.0) -> int:
        """Return the exit code, as subprocess does; ends the process if it takes too long."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"no end after {seconds} s: {self.log.read_text()}")
        return self._process.exitcode


def _be_script(
    command: tuple[str, ...],
    log: Path,
    environment: dict[str, str],
    disk: tuple[Path, int, Path] | None,
    signal_at: tuple[int, int] | None,
) -> None:
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.argv = [str(script_path(command[0])), *command[1:]]
    if disk is not None and not _cover(disk[0], disk[1]):
        sys.exit(CANNOT_MOUNT)
    if signal_at is not None:
        kill_at(*signal_at)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if disk is not None:
            shutil.copytree(disk[0], disk[2])


def _cover(folder: Path, size: int) -> bool:
    """Mount a file system of `size` bytes on a folder, for this process alone."""
    new_mounts, recursive, private = 0x20000, 0x4000, 0x40000  # from sched.h and sys/mount.h
    libc = ctypes.CDLL(None)
    return (
        sys.platform == "linux"
        and libc.unshare(new_mounts) == 0
        and libc.mount(None, b"/", None, recursive | private, None) == 0
        and libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0
    )


def checkpoint(run: Path, name: str = LAST_CHECKPOINT) -> dict[str, object]:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def same(a: object, b: object) -> bool:
    """Equal in every bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log_lines(run: Path) -> list[dict[str, object]]:
    """The lines of metrics.jsonl without the times."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


def assert_same_runs(run: Path, reference: Path) -> None:
    """Check that two finished runs agree in every bit of their weights, averages, optimizers and
    metrics.
    """
    a, b = checkpoint(run), checkpoint(reference)
    for key in ("weights", "ema", "optimizers", "extra", "rules", "steps_per_epoch"):
        assert same(a[key], b[key]), key
    assert same(*({k: v for k, v in s["counters"].items() if k != "train_seconds"} for s in (a, b)))
    weights = "model.safetensors"
    assert (run / weights).read_bytes() == (reference / weights).read_bytes()
    assert (run / "run.json").read_text() == (reference / "run.json").read_text()
    assert log_lines(run) == log_lines(reference)


def assert_nothing_left(run: Path, reference: Path) -> None:
    """Check that a run's folder holds what the reference's does, and nothing else. The reference is
    shared: other tests may have evaluated it since, a training writes no such folder.
    """
    here, there = (
        {str(p.relative_to(folder)) for p in folder.rglob("*") if "events" not in p.name}
        for folder in (run, reference)
    )
    assert here == {name for name in there if Path(name).parts[0] != "evaluation"}
