#!/usr/bin/env python3
"""Train the VAE, the first stage of LSGM: `lsgm train-vae`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("train-vae")
