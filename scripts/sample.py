#!/usr/bin/env python3
"""Draw images from a trained run: a PNG grid, a folder of PNGs, or an NPZ with the array `images`
(N, C, H, W) in [0, 1].
"""

from lsgm.commands.run import run


def main() -> None:
    from lsgm.commands.sample import SampleOptions, sample_to_file
    from lsgm.config.command_line import parse_command_line

    sample_to_file(parse_command_line(SampleOptions, extra=(), description=__doc__).config)


if __name__ == "__main__":
    run(main)
