#!/usr/bin/env python3
"""Change images with a trained run: fill in pixels, colour grey images, draw given classes, go from
one image to another, encode and decode, or draw some latent groups anew. Each writes a PNG grid.
"""

import sys

from lsgm.commands.run import run


def main() -> None:
    from lsgm.commands.edit import COMMANDS, edit_command

    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__ + "\nUsage: edit.py {" + ",".join(COMMANDS) + "} [--help] ...")
        return
    edit_command(name, arguments)


if __name__ == "__main__":
    run(main)
