#!/usr/bin/env python3
"""Turn a checkpoint of another implementation into a run folder, which evaluate.py, sample.py and
lsgm.load() open.
"""

import sys

from lsgm.cli import run
from lsgm.importers.command import import_command


def main() -> None:
    import_command(sys.argv[1:], description=__doc__)


if __name__ == "__main__":
    run(main)
