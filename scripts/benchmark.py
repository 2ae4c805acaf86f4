#!/usr/bin/env python3
"""Measure. `train`: images/s, median seconds a step and peak memory of VAE and LSGM steps. `vae`: a
VAE step against a plain build of the same network, its FLOP/s, and where its time goes. `joint`: a
joint step against a step of each stage. `variance`: variance of both sides' gradients for every
weighting and proposal. `few-step`: error of samplers at few evaluations, beside those of diffusers;
`few-step-images`: of score models of images, beside the published sampler too.
"""

import sys

from lsgm.commands.run import run
from lsgm.errors import UserError


def main() -> None:
    from lsgm.benchmark import COMMANDS

    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__ + "\nUsage: benchmark.py {" + ",".join(COMMANDS) + "} [--help] ...")
        return
    if name not in COMMANDS:
        raise UserError(f"{name}: no such benchmark; known are {', '.join(COMMANDS)}")
    COMMANDS[name](arguments)


if __name__ == "__main__":
    run(main)
