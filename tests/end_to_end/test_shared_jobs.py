"""Sampling and evaluation by several processes: the same bytes and numbers, and one clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import REPOSITORY, ScriptProcess, script_path

FAILING = Path(__file__).parent / "failing.py"
SAMPLE = "--n 13 --batch_size 3 --solver heun --nfe 4 --device cpu".split()
EVALUATE = (
    "--metrics nelbo normal iw ode --limit 14 --k 3 --iw 1 2 --iw_steps 3 --batch_size 4 "
    "--tolerance 1e-2 --device cpu --sampling.solver heun --sampling.nfe 4 --sampling.batch_size 4"
).split()


def torchrun(size, name, *arguments):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    # Python before 3.12.7 takes --run for torchrun's own without the two dashes.
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(size), "--", script_path(name), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def start(size, folder, *command, **environment):
    """The processes of one job, started by hand."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        ScriptProcess(
            tuple(map(str, command)),
            folder / f"log{rank}",
            common | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]


def finish(processes):
    """Exit codes and what the processes said, each its own."""
    codes = [process.wait(120) for process in processes]
    return codes, [process.log.read_text() for process in processes]


def sample(tiny, size, folder, out):
    folder.mkdir(exist_ok=True)
    command = ("sample", "--run", tiny.lsgm, *SAMPLE, "--out", folder / out)
    if out == "a.npz":
        command += ("--latents", "True")
    codes, said = finish(start(size, folder, *command))
    assert codes == [0] * size, said
    assert said[0].startswith("13 images, heun, NFE 4 a batch of 3"), said
    assert said[0].count("\n") == 1 and said[1:] == [""] * (size - 1)
    for log in folder.glob("log*"):
        log.unlink()
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("out", ["a.npz", "a.png", "a"])
def test_samples_are_the_same_bytes(tiny, tmp_path, out):
    one, two, three = (sample(tiny, n, tmp_path / str(n), out) for n in (1, 2, 3))
    assert len(one) == (13 if out == "a" else 1)
    assert one == two == three


def test_torchrun_shares_sampling(tiny, tmp_path):
    """Also only some of the images, in fewer batches than processes."""
    for size in (1, 2):
        out = tmp_path / f"{size}.npz"
        done = torchrun(
            size, "sample", "--run", tiny.lsgm, *SAMPLE, "--index", 4, 1, 3, "--out", out
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("3 images") and done.stdout.count("\n") == 1
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    assert len(np.load(tmp_path / "1.npz")["images"]) == 3


def without_seconds(value):
    if isinstance(value, dict):
        clocks = ("seconds", "seconds_per_sample", "timings", "repeat")
        return {k: without_seconds(v) for k, v in value.items() if k not in clocks}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def evaluate(tiny, size, folder):
    folder.mkdir()
    codes, said = finish(
        start(
            size, folder, "evaluate", "--run", tiny.lsgm, *EVALUATE, "--json", folder / "all.json",
            "--out", folder / "report",
        )
    )  # fmt: skip
    assert codes == [0] * size, said
    assert said[1:] == [""] * (size - 1)
    table = [line.rpartition("|")[0].rpartition("|")[0] for line in said[0].splitlines()]
    files = [folder / "all.json", folder / "report" / "report.json"]
    pictures = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    return table, [without_seconds(json.loads(file.read_text())) for file in files], pictures


@pytest.mark.slow
def test_numbers_are_the_same_to_the_last_digit(tiny, tmp_path):
    one, two, three = (evaluate(tiny, n, tmp_path / str(n)) for n in (1, 2, 3))
    assert {"nelbo", "normal", "iw", "ode"} <= one[1][0][0].keys()
    assert one[1][0][0]["ode"]["num_images"] == 14
    assert one[1][1]["numbers"]["bound_curves"] and one[1][1]["numbers"]["decomposition"]
    assert one == two == three


# One clean end


def fail(folder, rank, by, script, *arguments):
    """Exit codes and errors of three processes of which one fails in its second batch."""
    started = time.monotonic()
    logs = folder.parent / f"{folder.name}-logs"
    logs.mkdir()
    failing = ("../tests/end_to_end/failing", script_path(script), *arguments)
    codes, said = finish(start(3, logs, *failing, FAIL_RANK=str(rank), FAIL_BY=str(by)))
    assert time.monotonic() - started < 50  # the other processes would sleep for 60 s
    return codes, said


@pytest.mark.parametrize("rank, out", [(0, "a.npz"), (2, "a.npz"), (2, "a.png"), (1, "a")])
def test_an_error_on_one_process_ends_all(tiny, tmp_path, rank, out):
    """While the others are in a batch: with one line, its code, and nothing left."""
    command = ("sample", "--run", tiny.lsgm, *SAMPLE, "--n", 40, "--out", tmp_path / out)
    codes, errors = fail(tmp_path, rank, "user_error", *command)
    assert codes == [2, 2, 2], errors
    assert errors[rank] == "error: this batch is bad\n"
    assert [e for k, e in enumerate(errors) if k != rank] == ["", ""]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_signal_to_one_process_ends_all(tiny, tmp_path):
    command = ("sample", "--run", tiny.lsgm, *SAMPLE, "--n", 40, "--out", tmp_path / "a.npz")
    codes, errors = fail(tmp_path, 1, int(signal.SIGTERM), *command)
    assert codes == [143] * 3 and errors == ["", "error: interrupted by SIGTERM\n", ""]
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_an_evaluation_ends_all(tiny, tmp_path):
    command = (
        "evaluate", "--run", tiny.lsgm, *EVALUATE, "--json", tmp_path / "a.json", "--out", tmp_path
    )  # fmt: skip
    codes, errors = fail(tmp_path, 1, "not_finite", *command)
    assert codes == [2] * 3 and errors[1:] == ["error: this batch is bad\n", ""]
    assert errors[0].startswith("digits") and errors[0].count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_all_make_is_said_once(tiny, tmp_path):
    for command in (
        ("sample", "--run", tmp_path / "none", "--device", "cpu"),
        ("sample", "--run", tiny.lsgm, "--nfe", "few"),
        ("evaluate", "--run", tiny.lsgm, "--metrics", "none"),
        ("evaluate", "--run", tiny.lsgm, "--json", tiny.lsgm / "run.json" / "a.json"),
    ):
        codes, said = finish(start(2, tmp_path, *command))
        assert codes == [2, 2], said
        assert "".join(said).count("\n") == 1 and "".join(said).startswith("error: "), said
        for log in tmp_path.glob("log*"):
            log.unlink()


def test_torchrun_reports_the_code(tiny, tmp_path):
    """It ends with its own code, after a table of those of the processes."""
    done = torchrun(2, "sample", "--run", tmp_path / "none", "--out", tmp_path / "a.npz")
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert "exitcode  : 2" in done.stderr and list(tmp_path.iterdir()) == []
