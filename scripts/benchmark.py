#!/usr/bin/env python3
"""Measure speed, memory and variance: `lsgm benchmark`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("benchmark")
