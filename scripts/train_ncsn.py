#!/usr/bin/env python3
"""Train a score model of images, or a classifier: `lsgm train-score`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("train-score")
