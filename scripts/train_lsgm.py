#!/usr/bin/env python3
"""Train the score-based prior with the VAE, the second stage of LSGM: `lsgm train-lsgm`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("train-lsgm")
