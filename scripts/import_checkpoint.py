#!/usr/bin/env python3
"""Make a run of another implementation's checkpoint: `lsgm import`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("import")
