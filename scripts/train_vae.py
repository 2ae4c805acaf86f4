#!/usr/bin/env python3
"""Train the hierarchical VAE, the first stage of LSGM. With no arguments: handwritten digits,
minutes on a CPU.
"""

from pathlib import Path

from lsgm.commands.run import run

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits" / "vae.yaml"


def main() -> None:
    from lsgm.config.command_line import parse_command_line
    from lsgm.config.training import VAETrainConfig
    from lsgm.training.runs.latent import train_vae

    line = parse_command_line(VAETrainConfig, default_config=DEFAULT_CONFIG, description=__doc__)
    train_vae(line.config, line.options["out"], resume=line.options["resume"])


if __name__ == "__main__":
    run(main)
