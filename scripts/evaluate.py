#!/usr/bin/env python3
"""Likelihood of trained runs, each number with its bound, estimator and standard error."""

from lsgm.cli import run


def main() -> None:
    from lsgm.configio import parse_command_line
    from lsgm.evaluation.report import evaluate
    from lsgm.options import EvaluateOptions

    evaluate(parse_command_line(EvaluateOptions, extra=(), description=__doc__).config)


if __name__ == "__main__":
    run(main)
