#!/usr/bin/env python3
"""Change images with a trained run: `lsgm edit`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("edit")
