"""The command ``export RUN --to diffusers --out DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lsgm.config.training import DataConfig
from lsgm.errors import UserError
from lsgm.exporters.diffusers import export_score_model
from lsgm.exporters.parts import export_parts
from lsgm.models.images import DataSGM
from lsgm.models.latent import VAEModel
from lsgm.models.loading import load
from lsgm.models.release import load_data_config

__all__ = ["TARGETS", "export_command"]


def _to_diffusers(model: Any, data: DataConfig, out: Path) -> str:
    if isinstance(model, VAEModel):
        return export_parts(model, data, out)
    if isinstance(model, DataSGM):
        return export_score_model(model, out)
    raise UserError(f"a {model.kind} cannot be exported; score models, VAEs and LSGMs can")


TARGETS: dict[str, Callable[[Any, DataConfig, Path], str]] = {"diffusers": _to_diffusers}
"""What a model can be exported to, by name."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def export_command(argv: Sequence[str], prog: str | None = None) -> None:
    """Write the model of a finished run in the form of other software.

    Raises:
        UserError: RUN is no finished run, its model has no place in the target, DIR is there
            already, or the arguments are wrong.
    """
    parser = _Parser(prog=prog, description=(export_command.__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--to",
        choices=sorted(TARGETS),
        required=True,
        help="diffusers: of a score model a folder that the package loads; of an LSGM its "
        "autoencoder and its prior in such a folder, with weights by our names",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    options = parser.parse_args(argv)
    model, data = load(options.run), load_data_config(options.run)
    print(TARGETS[options.to](model, data, Path(options.out)))
