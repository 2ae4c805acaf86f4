"""The training loop and what it stands on."""

from lsgm.system.files import RunFolder
from lsgm.training.checkpoint import Checkpoints
from lsgm.training.context import BatchSource, EvalContext, FitResult
from lsgm.training.distributed import World, all_max, all_mean, distributed, gather_rows, on_main
from lsgm.training.ema import EMA
from lsgm.training.interrupt import TrainingInterrupted, resume_command
from lsgm.training.optimizers import make_optimizer
from lsgm.training.state import Stage, StepContext, StepOutput, TrainState

__all__ = [
    "EMA",
    "BatchSource",
    "Checkpoints",
    "EvalContext",
    "FitResult",
    "RunFolder",
    "Stage",
    "StepContext",
    "StepOutput",
    "TrainState",
    "TrainingInterrupted",
    "World",
    "all_max",
    "all_mean",
    "distributed",
    "make_optimizer",
    "gather_rows",
    "on_main",
    "resume_command",
]
