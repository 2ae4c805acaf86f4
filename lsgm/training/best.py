"""``train.release: best``: a run ends with the weights of its best evaluation on test images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lsgm.errors import UserError
from lsgm.system.files import RunFolder
from lsgm.training.checkpoint import Checkpoints
from lsgm.training.context import EvalContext
from lsgm.training.distributed import World, on_main
from lsgm.training.state import TrainState

__all__ = ["BestWeights", "Release"]

METRICS = ("nelbo", "loss")
"""What is smallest in the best evaluation: the first of these that it returns."""

Evaluate = Callable[[EvalContext], Mapping[str, float | None]]
Release = Callable[[TrainState, dict[str, Any]], None]
"""Writes the trained model, with notes for its ``run.json``."""


class BestWeights:
    """The evaluated weights of the best evaluation so far, in ``checkpoints/best`` of a run.

    They are the running averages where there are any. A resumed run knows them.

    Args:
        run: The run's folder.
        world: The processes; the main one writes.
    """

    def __init__(self, run: RunFolder, world: World) -> None:
        self.run = run
        self.world = world
        self.files = Checkpoints(run.checkpoints / "best", keep=1)
        self.value: float | None = None

    def watch(self, evaluate: Evaluate) -> Evaluate:
        """``evaluate``, whose weights are then kept if they are the best ones."""

        def watched(context: EvalContext) -> Mapping[str, float | None]:
            results = evaluate(context)
            on_main(self.world, lambda: self._offer(context, results))
            return results

        return watched

    def releasing(self, release: Release) -> Release:
        """``release`` of the best weights in place of the last: it finds them in the state's
        evaluation models, and its notes say from which step they are.
        """

        def of_the_best(state: TrainState, notes: dict[str, Any]) -> None:
            best = self._read()
            if best is None:  # no evaluation has been finite
                release(state, notes)
                return
            step, content = best
            models = state.evaluation_models()
            for name, weights in content["models"].items():
                models[name].load_state_dict(weights)
            chosen = {"step": step, content["metric"]: content["value"]}
            release(state, {**notes, "release": chosen})

        return of_the_best

    def _offer(self, context: EvalContext, results: Mapping[str, float | None]) -> None:
        metric = next(name for name in METRICS if name in results)
        if self.value is None:
            kept = self._read()
            self.value = math.inf if kept is None else kept[1]["value"]
        value = results[metric]
        if value is None or not value < self.value:  # NaN is no improvement
            return
        self.value = value
        models = {name: model.state_dict() for name, model in context.models.items()}
        self.files.folder.mkdir(parents=True, exist_ok=True)
        # A return to a checkpoint may have left the path that a later step was on.
        for step in self.files.steps():
            if step > context.step:
                self.files.path(step).unlink()
        self.files.save(context.step, {"metric": metric, "value": self.value, "models": models})

    def _read(self) -> tuple[int, dict[str, Any]] | None:
        try:
            return self.files.latest(print)
        except UserError as error:
            print(f"warning: the best evaluation's weights are lost: {error}", flush=True)
            return None
