#!/usr/bin/env python3
"""Pack pictures of any form into one data set: `lsgm prepare`."""

from lsgm.commands.main import run_script

if __name__ == "__main__":
    run_script("prepare")
