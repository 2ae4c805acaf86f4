"""Two processes that share a batch follow one that has all of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import (
    KILLS,
    REPOSITORY,
    STEPS,
    ScriptProcess,
    assert_nothing_left,
    assert_same_runs,
    checkpoint,
    log_lines,
    script_path,
)


def assert_same_course(run, reference):
    """Check that weights end where the reference's do, by a distance that is small against the way
    they have come.
    """
    first = checkpoint(reference, "step_00000000.pt")["weights"]
    one, two = (checkpoint(folder) for folder in (reference, run))
    assert one["counters"]["step"] == two["counters"]["step"] == STEPS
    assert one["weights"].keys() == two["weights"].keys()

    def distance(a, b):
        return torch.stack(
            [(a[k].double() - b[k].double()).square().sum() for k in a if a[k].is_floating_point()]
        )

    way, apart = distance(first, one["weights"]), distance(two["weights"], one["weights"])
    assert way.sum() > 1e-2
    assert (apart.sum() / way.sum()).sqrt() < 1e-3
    for name, value in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], value, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Metrics are means over all images, also those of the last step.
    for a, b in zip(log_lines(run), log_lines(reference), strict=True):
        assert a.keys() == b.keys() and (a["phase"], a["step"]) == (b["phase"], b["step"])
        for key in ("loss", "nelbo", "kl", "reconstruction"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-2), (a["step"], key)


def torchrun(*arguments, options=(), **environment):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *options, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory):
    """The first stage, trained by two processes."""
    run = tmp_path_factory.mktemp("shared") / "run"
    name, *arguments = tiny.command("vae", run)
    done = torchrun(script_path(name), *arguments)
    assert done.returncode == 0, done.stderr
    return run


def test_torchrun_follows_one_process_in_the_first_stage(tiny, shared):
    assert_same_course(shared, tiny.vae)


def test_torchrun_restarts_a_run_whose_worker_was_killed(tiny, shared, tmp_path):
    name, *arguments = tiny.command("vae", tmp_path / "run")
    script = Path(__file__).parent / "killing.py"
    restarts = 2 if KILLS >= 20 else 1
    ranks, steps = ",".join(("1", "0")[:restarts]), ",".join(("7", "12")[:restarts])
    done = torchrun(
        script, script_path(name), *arguments, "--resume", "auto",
        options=("--max-restarts", "3"), KILL_RANKS=ranks, KILL_STEPS=steps,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resumed at step") == restarts, done.stderr
    assert "is in use by" not in done.stderr
    assert_same_runs(tmp_path / "run", shared)
    assert_nothing_left(tmp_path / "run", shared)


def test_two_processes_follow_one_in_the_second_stage(tiny, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        ScriptProcess(
            tiny.command("lsgm", tmp_path / "run"),
            tmp_path / f"log{rank}",
            common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in processes]
    assert codes == [0, 0], [process.log.read_text() for process in processes]
    assert_same_course(tmp_path / "run", tiny.lsgm)
