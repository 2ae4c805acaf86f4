"""The command ``evaluate``: likelihoods and scores of trained runs."""

from __future__ import annotations

from collections.abc import Sequence

from lsgm.config.command_line import parse_command_line
from lsgm.evaluation.report.evaluate import evaluate
from lsgm.evaluation.report.options import EvaluateOptions

__all__ = ["SHOWN", "evaluate_command"]

SHOWN = tuple(
    "run metrics split limit samples k iw_steps out report json pictures batch_size seed data_root "
    "device sampling.solver sampling.nfe quality.extractor quality.num".split()
)
"""The options that ``--help`` shows."""


def evaluate_command(argv: Sequence[str], prog: str) -> None:
    """Likelihood of trained runs, each number with its bound, estimator and standard error."""
    line = parse_command_line(
        EvaluateOptions,
        argv,
        extra=(),
        prog=prog,
        description=evaluate_command.__doc__,
        shown=SHOWN,
    )
    evaluate(line.config)
