"""The command ``import FORMAT FILE --out RUN``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from lsgm.errors import UserError
from lsgm.importers.formats import AUTO, IMPORTERS, detect_format

__all__ = ["import_command"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def import_command(argv: Sequence[str], prog: str | None = None) -> None:
    """Turn a checkpoint of another implementation into a run folder, which evaluate, sample and
    lsgm.load() open.

    Raises:
        UserError: As the importers, and for wrong arguments.
    """
    parser = _Parser(prog=prog, description=(import_command.__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "format", choices=[AUTO, *sorted(IMPORTERS)], help="what wrote the file; auto: find out"
    )
    parser.add_argument("file", metavar="FILE", help="the checkpoint; nothing in it is executed")
    parser.add_argument("--out", metavar="RUN", required=True, help="run folder to write")
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="last or averaged weights, of the prior if there is one and else of the VAE or the "
        "score model (default: averaged, but last of a VAE)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="score-sde: YAML file of the model or name of one that comes with lsgm, or name of a "
        "published checkpoint, such as vp/cifar10_ddpmpp_continuous (default: by the shapes of the "
        "weights)",
    )
    options = parser.parse_args(argv)
    name = options.format
    if name == AUTO:
        name = detect_format(options.file)
    importer = IMPORTERS[name]
    arguments = {"config": options.config} if importer.takes_config else {}
    if options.config is not None and not importer.takes_config:
        raise UserError(f"--config: a file of format {name} says itself which model it is of")
    print(importer.run(options.file, options.out, options.weights, **arguments))
