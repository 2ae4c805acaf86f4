"""The formats of checkpoints that can be imported, and telling one from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsgm.errors import UserError
from lsgm.importers.diffusers_folder import import_diffusers
from lsgm.importers.diffusers_reading import is_diffusers
from lsgm.importers.ncsn_checkpoints import import_ncsn, import_ncsnv2, is_ncsn, is_ncsnv2
from lsgm.importers.parts import import_parts, is_parts
from lsgm.importers.reading import read_checkpoint
from lsgm.importers.runs import ImportedRun, import_official_lsgm
from lsgm.importers.score_sde import import_score_sde, is_score_sde

__all__ = ["AUTO", "IMPORTERS", "Importer", "detect_format"]

AUTO = "auto"


@dataclass(frozen=True)
class Importer:
    """One format.

    Attributes:
        run: ``(file, out, weights, config)`` to the run that it wrote; ``weights`` and ``config``
            may be None.
        recognises: Whether what a PyTorch file holds (a folder: its path) is of this format.
        takes_config: Whether ``--config`` means something to it.
    """

    run: Callable[..., ImportedRun]
    recognises: Callable[[Any], bool]
    takes_config: bool = False


def _is_official_lsgm(contents: Any) -> bool:
    return isinstance(contents, dict) and {"args", "vae_state_dict"} <= contents.keys()


IMPORTERS: dict[str, Importer] = {
    "official-lsgm": Importer(import_official_lsgm, _is_official_lsgm),
    "score-sde": Importer(import_score_sde, is_score_sde, takes_config=True),
    "ncsn": Importer(import_ncsn, is_ncsn, takes_config=True),
    "ncsnv2": Importer(import_ncsnv2, is_ncsnv2, takes_config=True),
    "exported-lsgm": Importer(import_parts, is_parts),
    "diffusers": Importer(import_diffusers, is_diffusers),
}
"""Importers by the name of the format; a new one is one function and its line here."""


def detect_format(path: str | Path) -> str:
    """The format of a file, or of a folder.

    Raises:
        UserError: It cannot be read, or is of none of the formats.
    """
    path = Path(path)
    contents = path if path.is_dir() else read_checkpoint(path, unchecked=True)
    for name, importer in IMPORTERS.items():
        if importer.recognises(contents):
            return name
    raise UserError(
        f"checkpoint {path}: none of the formats {', '.join(IMPORTERS)}; it holds "
        f"{_described(contents)}"
    )


def _described(contents: Any) -> str:
    if isinstance(contents, Path):
        return "the files " + ", ".join(sorted(child.name for child in contents.iterdir())[:6])
    if isinstance(contents, dict):
        return "the keys " + ", ".join(map(str, list(contents)[:6]))
    return f"a {type(contents).__name__}"
