#!/usr/bin/env python3
"""Draw images from a trained run: `lsgm sample`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("sample")
