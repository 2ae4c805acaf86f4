r"""What the multistep exponential integrators share: which evaluations a step uses, and how a solve
starts.

A method of this family replaces a slowly varying function of the network's output (the data
prediction, or the residual of a reference) by the polynomial through its evaluations and integrates
the rest exactly. It says what it evaluates and how a step follows from the evaluations; the rest is
here.

- A *predictor* step extrapolates from the evaluations so far (Adams-Bashforth).
- A *corrector* repeats the step with the evaluation at its predicted end (Adams-Moulton, once).
  That evaluation is needed for the next step anyway and is not repeated at the corrected state, so
  one order is gained at no extra call (arXiv 2302.04867 section 3).
- The *start*: the first step knows one evaluation, so its error is O(h^2), which would leave any
  method at order 2. From order 3 on the first step is corrected, whether or not the others are
  (error O(h^3), no extra call). For order 4 the first step is evaluated and corrected twice (one
  extra call) and, when the second step has been made, once more with its evaluation: error O(h^4).
  With fewer than ``4 order`` steps the first step is too long for this to help, and the plain start
  is used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.solvers.base import Problem, StepSolver

__all__ = ["MultistepSolver"]


@dataclass(frozen=True, kw_only=True)
class MultistepSolver(StepSolver):
    """A multistep exponential integrator.

    Args:
        order: Of the method; with a corrector the predictor is one lower.
        lower_order_final: Lower the order in the last steps (arXiv 2211.01095 appendix) of solves
            with fewer than ``8 order`` steps: steadier there. The last step is then of first order,
            which would cost longer solves theirs.
    """

    order: int = 2
    lower_order_final: bool = False

    @property
    @abstractmethod
    def corrects(self) -> bool:
        """Whether every step but the last is corrected."""

    @abstractmethod
    def _evaluate(self, problem: Problem, x: Tensor, j: int) -> Tensor:
        """What is extrapolated, at state ``x`` and the j-th time; one network call."""

    @abstractmethod
    def _advance(
        self, problem: Problem, i: int, x: Tensor, first: int, values: Sequence[Tensor]
    ) -> Tensor:
        """The state at ``times[i + 1]`` from ``x`` at ``times[i]`` with the polynomial through
        ``values``.

        The values were evaluated at ``times[first], times[first + 1], ...``, which include
        ``times[i]``.
        """

    def _calls(self, num_steps: int) -> int:
        return num_steps + (self.order == 4 and self._has_accurate_start(num_steps))

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        total, remaining = problem.num_steps, problem.num_steps - i
        # A corrected step has evaluated its predicted end, which is this step's start. That
        # evaluation is not repeated at the corrected state (UniPC's rule): the two differ by the
        # local error of the predictor, which enters the next step times another h.
        if i == 0 or not self._is_corrected(i - 1, total):
            history.append(self._evaluate(problem, x, i))
        # The corrector's polynomial has one node more than the predictor's, the step's end, so the
        # predictor of a pair of order p keeps p - 1.
        memory = self.order - 1 if self.corrects else self.order
        # With r steps left at most r nodes, so that the last step is of first order.
        lower = self.lower_order_final and total < 8 * self.order
        del history[: -min(memory, remaining) if lower else -memory]
        first = i + 1 - len(history)
        predicted = self._advance(problem, i, x, first, history)
        # No later step would use an evaluation at the last end, so to correct the last step costs a
        # call of its own: one step more is worth more.
        if remaining == 1 or not self._is_corrected(i, total):
            return predicted

        history.append(self._evaluate(problem, predicted, i + 1))
        careful = self.order == 4 and self._has_accurate_start(total)
        # The predicted end of the first step is wrong by O(h^2), hence the corrected one by O(h^3)
        # for two reasons, the line through two evaluations and the error of the second. The second
        # reason goes here, by evaluating again; the first when there is a third evaluation.
        if careful and i == 0:
            corrected = self._advance(problem, i, x, first, history)
            history[-1] = self._evaluate(problem, corrected, i + 1)
        # Replace the first step's integral of the line through the evaluations 0 and 1 by that of
        # the parabola through 0, 1 and 2. From the state zero a step is its integral alone.
        if careful and i == 1:
            zero = torch.zeros_like(x)
            full = self._advance(problem, 0, zero, 0, history)
            x = x + full - self._advance(problem, 0, zero, 0, history[:2])
        return self._advance(problem, i, x, first, history)

    def _is_corrected(self, i: int, num_steps: int) -> bool:
        """Whether step i ends with an evaluation at its predicted end."""
        return self.corrects or (i < self.order - 2 and self._has_accurate_start(num_steps))

    def _has_accurate_start(self, num_steps: int) -> bool:
        return self.order > 2 and num_steps >= 4 * self.order
