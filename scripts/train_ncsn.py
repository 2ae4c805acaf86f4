#!/usr/bin/env python3
"""Train a score model of the images themselves: NCSN (arXiv 1907.05600) or a score-SDE model (arXiv
2011.13456), or a classifier to guide or judge one; `kind` in the configuration says which. With no
arguments: NCSN on handwritten digits, minutes on a CPU.
"""

from pathlib import Path

from lsgm.commands.run import run

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits" / "ncsn.yaml"


def main() -> None:
    from lsgm.config.command_line import parse_command_line
    from lsgm.config.training import NCSNTrainConfig
    from lsgm.training.runs.images import train_ncsn

    line = parse_command_line(NCSNTrainConfig, default_config=DEFAULT_CONFIG, description=__doc__)
    train_ncsn(line.config, line.options["out"], resume=line.options["resume"])


if __name__ == "__main__":
    run(main)
