"""500 random mutations of configurations and command lines: a run, or exit code 2 with one line."""

from __future__ import annotations

import inspect
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from fuzz import mutated_flags, mutated_yaml
from test_ncsn_pipeline import TINY as DATA_SPACE_CONFIG
from tiny import LSGM_CONFIG, VAE_CONFIG, Outcome, TinyRuns, call

from lsgm.commands.edit import InpaintOptions
from lsgm.commands.sample import SampleOptions
from lsgm.config.training import LSGMTrainConfig, NCSNTrainConfig, VAETrainConfig
from lsgm.evaluation.report.options import EvaluateOptions
from lsgm.sampling.sampler import SOLVER_OPTIONS
from lsgm.solvers import SOLVERS
from lsgm.system import files
from lsgm.training.runs import images as data_runs
from lsgm.training.runs import latent as runs

SECONDS = 20
"""Longest that one case may take."""

PINNED = {
    "train.max_steps": "1",
    "train.batch_size": "4",
    "train.eval_images": "4",
    "train.num_threads": "1",
    "train.compile": "false",  # minutes of compiling
}
"""What keeps a training short. It comes last, so that a configuration may say anything."""


def pins() -> list[str]:
    return [token for key, value in PINNED.items() for token in (f"--{key}", value)]


class Cases:
    """Command lines of one kind, each in a folder of its own."""

    def __init__(self, tiny: TinyRuns, folder: Path, seed: int) -> None:
        self.tiny, self.folder, self.rng = tiny, folder, random.Random(seed)

    def training(self, script: str, schema: type, text: str, *more: str) -> list[str]:
        """A training whose configuration or command line is mutated."""
        path, skip = self.folder / "x.yaml", list(PINNED)
        if self.rng.random() < 0.5:
            mutated_yaml(self.rng, path, text, schema, skip)
            flags = []
        else:
            path.write_text(text)
            flags = mutated_flags(self.rng, schema, skip, self.rng.choice((1, 1, 2)))
        out = ["--out", str(self.folder / "run")]
        return [script, "--config", str(path), *flags, *more, *pins(), *out]

    def vae(self) -> list[str]:
        return self.training("train_vae", VAETrainConfig, VAE_CONFIG)

    def lsgm(self) -> list[str]:
        source = ("--vae", str(self.tiny.vae))
        return self.training("train_lsgm", LSGMTrainConfig, LSGM_CONFIG, *source)

    def data_space(self) -> list[str]:
        kind = self.rng.choice(("ncsn", "score_sde", "classifier"))
        return self.training("train_ncsn", NCSNTrainConfig, f"kind: {kind}\n{DATA_SPACE_CONFIG}")

    def solver(self, schema: type) -> list[str]:
        """A solver and options, mostly its own."""
        name = self.rng.choice(list(SOLVERS))
        own = set(inspect.signature(SOLVERS[name]).parameters)
        foreign = [option for option, names in SOLVER_OPTIONS.items() if not own.issuperset(names)]
        skip = ["run", "compile", *(foreign if self.rng.random() < 0.8 else ())]
        nfe = ["--nfe", "8"] if name not in ("dopri5", "rk45") else []
        flags = mutated_flags(self.rng, schema, skip, self.rng.choice((1, 1, 2)))
        return ["--device", "cpu", "--solver", name, *nfe, *flags]

    def sample(self) -> list[str]:
        run = ["--run", str(self.tiny.lsgm), "--n", "2"]
        return ["sample", *run, *self.solver(SampleOptions)]

    def evaluate(self) -> list[str]:
        run = ["--run", str(self.tiny.vae), "--limit", "2", "--device", "cpu", "--report", "false"]
        skip = ["run", "report", "pictures"]
        flags = mutated_flags(self.rng, EvaluateOptions, skip, self.rng.choice((1, 2)))
        return ["evaluate", *run, *flags]

    def edit(self) -> list[str]:
        run = ["--run", str(self.tiny.lsgm), "--samples", "1", "--index", "0"]
        return ["edit", "inpaint", *run, *self.solver(InpaintOptions)]


COUNTS: dict[Callable[[Cases], list[str]], int] = {
    Cases.vae: 90,
    Cases.lsgm: 25,
    Cases.data_space: 75,
    Cases.sample: 130,
    Cases.evaluate: 80,
    Cases.edit: 100,
}


@contextmanager
def deadline(command: list[str]) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end after {SECONDS} s: {command}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(command: list[str], outcome: Outcome) -> None:
    """A run, or code 2 with one line of error at the end."""
    assert outcome.code in (0, 2), (command, outcome)
    if outcome.code == 2:
        outcome.error(2, log=True)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that takes long and has no part in this: the disk's patience, and drawing curves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)
    for module in (runs, data_runs):
        monkeypatch.setattr(module, "learning_curves", lambda *args, **kwargs: None)


@pytest.mark.parametrize("kind", COUNTS, ids=lambda kind: kind.__name__)
def test_mutations_are_refused_in_one_line_or_run(
    kind: Callable[[Cases], list[str]], tiny: TinyRuns, tmp_path: Path, cheap: None
) -> None:
    for number in range(COUNTS[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = kind(Cases(tiny, folder, number))
        with deadline(command):
            outcome = call(*command)
        judge(command, outcome)
        shutil.rmtree(folder)
