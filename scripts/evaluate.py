#!/usr/bin/env python3
"""Likelihoods and scores of trained runs: `lsgm evaluate`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("evaluate")
