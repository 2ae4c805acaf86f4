#!/usr/bin/env python3
"""Write the model of a finished run in the form of other software: `lsgm export`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("export")
