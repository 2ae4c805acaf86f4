"""Reading of diffusers' folders: the options of network and scheduler, and the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from lsgm.errors import UserError
from lsgm.importers.reading import first_line, read_checkpoint, read_json

__all__ = [
    "DDPM",
    "EXPLODING",
    "SCHEDULER",
    "UNET",
    "WEIGHTS",
    "DiffusersFolder",
    "is_diffusers",
    "read_diffusers",
]

UNET, SCHEDULER = "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
EXPLODING, DDPM = "ScoreSdeVeScheduler", "DDPMScheduler"


@dataclass(frozen=True)
class DiffusersFolder:
    """A folder and its parts; ``weights`` are those of ``file``, mapped if its format allows."""

    path: Path
    file: Path
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    weights: dict[str, Tensor] = field(repr=False)

    @property
    def type(self) -> str:
        """Class of the scheduler."""
        return str(self.scheduler["_class_name"])


def is_diffusers(contents: Any) -> bool:
    """Whether a path is a folder of diffusers."""
    return isinstance(contents, Path) and any(
        (contents / name).is_file() for name in ("model_index.json", "unet/config.json")
    )


def read_diffusers(folder: str | Path) -> DiffusersFolder:
    """Read a folder.

    Raises:
        UserError: It lacks a file or has a damaged one, or is of another kind of model.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: a file; give the folder with unet and scheduler")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    unet_folder, scheduler_folder = _part(folder, "unet"), _part(folder, "scheduler")
    unet = read_json(unet_folder / UNET)
    scheduler = read_json(scheduler_folder / SCHEDULER)
    kind = scheduler.get("_class_name")
    if kind not in (EXPLODING, DDPM):
        raise UserError(
            f"{scheduler_folder / SCHEDULER}: scheduler {kind}; models of {EXPLODING} and "
            f"{DDPM} can be imported"
        )
    if unet.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(
            f"{unet_folder / UNET}: network {unet['_class_name']}; a UNet2DModel can be imported"
        )
    file, weights = _read_weights(unet_folder)
    return DiffusersFolder(folder, file, unet, scheduler, weights)


def _part(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    safe, pickled = (folder / name for name in WEIGHTS)
    if safe.is_file():
        try:
            return safe, dict(load_file(safe))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{safe}: damaged or truncated ({first_line(error)}); if it was downloaded, do so "
                "again"
            ) from None
    if pickled.is_file():
        weights = read_checkpoint(pickled)
        named = isinstance(weights, Mapping) and all(
            isinstance(v, Tensor) for v in weights.values()
        )
        if not named:
            raise UserError(f"{pickled}: holds something other than weights by name")
        return pickled, dict(weights)
    if (folder / f"{WEIGHTS[0]}.index.json").is_file():
        raise UserError(f"{folder}: its weights are in several files; save them in one")
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    raise UserError(f"{folder}: has no weights ({' or '.join(WEIGHTS)}), but {found}")
