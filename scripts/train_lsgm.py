#!/usr/bin/env python3
"""Train the score-based prior of LSGM end-to-end with a trained VAE, the second stage (arXiv
2106.05931).
"""

from pathlib import Path

from lsgm.commands.run import run

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits" / "lsgm.yaml"


def main() -> None:
    from lsgm.config.command_line import (
        LSGM_RUN,
        OUT,
        RESUME,
        VAE_RUN,
        parse_command_line,
        take_data_from_run,
    )
    from lsgm.config.training import LSGMTrainConfig
    from lsgm.training.runs.latent import train_lsgm

    line = parse_command_line(
        LSGMTrainConfig,
        extra=(VAE_RUN, LSGM_RUN, OUT, RESUME),
        default_config=DEFAULT_CONFIG,
        prepare=take_data_from_run,
        description=__doc__,
    )
    train_lsgm(line.config, line.options["out"], resume=line.options["resume"])


if __name__ == "__main__":
    run(main)
