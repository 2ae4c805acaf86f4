"""Parts of networks that become CUDA graphs: which, in what order; training is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_toy import ToyStage, train

from lsgm.config.training import TrainConfig
from lsgm.errors import UserError
from lsgm.training import World
from lsgm.training.graphs import graphable_parts


class Side(nn.Module):
    """Calls its parts in another order than it owns them; one twice, one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.tower = nn.Sequential(nn.Linear(4, 3), nn.SiLU())
        self.twice = nn.Sequential(nn.Linear(3, 3), nn.Identity())
        self.named = nn.Sequential(nn.Linear(3, 3))
        self.recomputed = nn.Linear(3, 3)
        self.recomputed.checkpointing = True
        self.resting = nn.Linear(3, 3).eval()

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(self.tower(x)))
        return self.last(self.resting(self.recomputed(self.named(input=h))))


def test_parts_are_the_largest_that_one_call_uses_once_in_the_order_of_execution() -> None:
    side = Side()
    x = torch.randn(5, 4)
    parts = graphable_parts({"side": side}, lambda: side(x))
    # of `named`, called by keyword, the layer inside is called by position
    assert [part.module for part in parts] == [side.tower, side.named[0], side.last]
    assert torch.equal(parts[0].inputs[0], x) and not parts[0].inputs[0].requires_grad
    assert parts[2].inputs[0].requires_grad and parts[2].inputs[0].is_leaf
    assert not any(m._forward_hooks for m in side.modules())


def test_needs_a_cuda_device_and_whole_batches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.cuda_graphs: needs one process on a CUDA device"):
        train(tmp_path / "run", accumulate=1, cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs: needs accumulate 1, not 2"):
        TrainConfig(cuda_graphs=True, accumulate=2)
    with pytest.raises(ValueError, match="cuda_graphs: needs compile false"):
        TrainConfig(cuda_graphs=True, compile=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_is_the_same(tmp_path: Path) -> None:
    ends = []
    for graphs in (False, True):
        stage = ToyStage(dropout=0.0)
        train(
            tmp_path / str(graphs),
            stage,
            world=World(torch.device("cuda")),
            device="cuda",
            accumulate=1,
            cuda_graphs=graphs,
        )
        ends.append(stage.state_dict())
    for name, plain in ends[0].items():
        assert torch.allclose(plain.float(), ends[1][name].float(), atol=1e-5), name
