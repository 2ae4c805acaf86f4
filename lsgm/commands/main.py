"""The console program ``lsgm COMMAND ...``; each script in ``scripts/`` runs one of its commands.

Only the command that runs is imported, so that ``lsgm --help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from lsgm import __version__
from lsgm.commands.run import run
from lsgm.errors import UserError

__all__ = ["COMMANDS", "Command", "main", "run_script"]


@dataclass(frozen=True)
class Command:
    """A command of the program.

    Attributes:
        target: ``"module:function"``; the function takes the arguments and the program's name.
        summary: What it does, in a line.
    """

    target: str
    summary: str

    def __call__(self, argv: Sequence[str], prog: str) -> None:
        module, _, name = self.target.partition(":")
        function: Callable[[Sequence[str], str], None] = getattr(import_module(module), name)
        function(argv, prog)


COMMANDS = {
    "prepare": Command(
        "lsgm.commands.prepare:prepare", "pack pictures of any form into one data set"
    ),
    "train-vae": Command("lsgm.commands.train:vae", "train the VAE, the first stage of LSGM"),
    "train-lsgm": Command("lsgm.commands.train:lsgm", "train the prior with it, the second stage"),
    "train-score": Command(
        "lsgm.commands.train:score",
        "train a score model of images (NCSN, score-SDE), or a classifier",
    ),
    "sample": Command("lsgm.commands.sample:sample", "draw images from a run"),
    "evaluate": Command("lsgm.commands.evaluate:evaluate_command", "likelihood and scores of runs"),
    "edit": Command("lsgm.commands.edit:edit", "inpaint, colour, interpolate, reconstruct, ..."),
    "import": Command(
        "lsgm.importers.command:import_command", "make a run of another implementation's checkpoint"
    ),
    "export": Command("lsgm.exporters.command:export_command", "write a run for other software"),
    "benchmark": Command("lsgm.commands.benchmark:benchmark", "measure speed, memory, variance"),
    "configs": Command(
        "lsgm.commands.configs:configs", "list the configurations that come with lsgm, or print one"
    ),
}
"""The commands by name; a new one is a function and its line here."""


def main() -> NoReturn:
    """Run the command line of this process and exit (:func:`lsgm.commands.run.run`)."""
    run(lambda: _dispatch(sys.argv[1:]))


def run_script(name: str) -> NoReturn:
    """Run one command with the arguments of this process, as a script of its own, and exit."""
    run(lambda: COMMANDS[name](sys.argv[1:], os.path.basename(sys.argv[0])))


def _dispatch(argv: Sequence[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        print(_help())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        COMMANDS[name](rest, f"lsgm {name}")
    else:
        raise UserError(f"{name}: no such command; known are {', '.join(COMMANDS)}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lsgm COMMAND [--option value ...]",
            "",
            "Score-based generative models in latent space and of images.",
            "",
            *lines,
            "",
            "lsgm COMMAND --help says more of a command, --help-all shows its every option.",
        ]
    )
