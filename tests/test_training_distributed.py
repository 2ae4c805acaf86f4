import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toy import ToyStage, train

from lsgm.errors import UserError
from lsgm.training import World, all_max, all_mean, distributed, on_main

TOY = Path(__file__).parent / "training_toy.py"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run_two(*arguments):
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(TOY), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(TOY.parent.parent),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    try:
        said = [p.communicate(timeout=300) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said
    return [out for out, _ in said]


def test_two_processes_follow_one_of_twice_the_batch(tmp_path):
    one = train(tmp_path / "one", ToyStage(dropout=0.0, norm=False), evaluate=None)
    _run_two(tmp_path / "two", "--plain", "--save", tmp_path / "state.pt")
    two = torch.load(tmp_path / "state.pt", weights_only=True)
    for key, value in one.state.stage.state_dict().items():
        torch.testing.assert_close(two["weights"][key], value, rtol=1e-4, atol=1e-6)
    for name, ema in one.state.ema_models().items():
        for key, value in ema.state_dict().items():
            torch.testing.assert_close(two["ema"][name][key], value, rtol=1e-4, atol=1e-6)
    a, b = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two"))
    assert len(a) == len(b)


def test_processes_skip_and_stop_together_and_another_number_goes_on(tmp_path):
    out = _run_two(tmp_path / "run", "--plain", "--nan-at", 4, "--stop-at", 8)
    assert all("stopped at step 9; continue with" in text for text in out)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000009.pt"
    assert torch.load(checkpoint, weights_only=True)["counters"]["skipped"] == 1

    def poison(step, loss):
        return loss * math.nan if step == 4 else loss

    stage = ToyStage(dropout=0.0, norm=False)
    one = train(tmp_path / "run", stage, resume=True)
    reference = ToyStage(dropout=0.0, norm=False)
    reference.poison = poison
    whole = train(tmp_path / "whole", reference)
    assert one.state.counters.skipped == whole.state.counters.skipped == 1
    for a, b in zip(stage.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed("cpu") as world:
        assert world == World(torch.device("cpu")) and world.is_main
        assert not torch.distributed.is_initialized()
        assert torch.equal(all_mean(torch.ones(2), world), torch.ones(2))
        assert torch.equal(all_max(torch.ones(2), world), torch.ones(2))
        assert on_main(world, lambda: 3) == 3
        with pytest.raises(UserError, match="x"):
            on_main(world, lambda: (_ for _ in ()).throw(UserError("x")))
