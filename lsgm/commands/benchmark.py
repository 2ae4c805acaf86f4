"""The command ``benchmark``."""

from __future__ import annotations

from collections.abc import Sequence

from lsgm.benchmark import COMMANDS
from lsgm.commands.subcommands import choose_subcommand

__all__ = ["benchmark"]


def benchmark(argv: Sequence[str], prog: str) -> None:
    """Measure. train: images/s, median seconds a step and peak memory of VAE and LSGM steps. vae: a
    VAE step against a plain build of the same network, its FLOP/s, and where its time goes. joint:
    a joint step against a step of each stage. variance: variance of both sides' gradients for every
    weighting and proposal. few-step: error of samplers at few evaluations, beside those of
    diffusers. few-step-images: of score models of images, beside the published sampler too. data:
    packing beside decoding, and reading from the pack beside the folder.
    """
    chosen = choose_subcommand(COMMANDS, argv, prog, benchmark.__doc__)
    if chosen is not None:
        name, arguments = chosen
        COMMANDS[name](arguments, f"{prog} {name}")
