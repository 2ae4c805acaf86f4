#!/usr/bin/env python3
"""Write the model of a finished run in the form of other software, so that it can be used there."""

import sys

from lsgm.commands.run import run
from lsgm.exporters.command import export_command


def main() -> None:
    export_command(sys.argv[1:], description=__doc__)


if __name__ == "__main__":
    run(main)
