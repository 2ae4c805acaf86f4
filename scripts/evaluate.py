#!/usr/bin/env python3
"""Likelihood of trained runs, each number with its bound, estimator and standard error."""

from lsgm.commands.run import run


def main() -> None:
    from lsgm.config.command_line import parse_command_line
    from lsgm.evaluation.report.evaluate import evaluate
    from lsgm.evaluation.report.options import EvaluateOptions

    evaluate(parse_command_line(EvaluateOptions, extra=(), description=__doc__).config)


if __name__ == "__main__":
    run(main)
