"""An LSGM, or a VAE, as parts that stand alone: its autoencoder and its prior.

::

    DIR/model_index.json               the parts, and the images that the model is of
    DIR/autoencoder/config.json        options of the hierarchical VAE (lsgm.config: VAEConfig)
    DIR/autoencoder/model.safetensors  its weights, by the names of vae.HierarchicalVAE
    DIR/prior/config.json              options of the score-based prior (lsgm.config: PriorConfig)
    DIR/prior/model.safetensors        its weights, by the names of lsgm.score.MixedNormalScore

A VAE has no prior. Weights are float32 (counters int64). ``import_checkpoint.py`` turns the folder
back into a run that computes the same to the last bit.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lsgm
from lsgm.config.training import DataConfig
from lsgm.exporters.folder import new_folder, write_part
from lsgm.importers.parts import CLASS, CONFIG, INDEX, WEIGHTS
from lsgm.models.latent import LSGM, VAEModel
from lsgm.system.files import atomic_write_text

__all__ = ["export_parts"]

README = f"""# Exported by lsgm {lsgm.__version__}

| file | what |
|---|---|
| `model_index.json` | the parts, and the images that the model is of (`spec`, `data`) |
| `autoencoder/config.json` | options of the hierarchical VAE (`VAEConfig`) |
| `autoencoder/model.safetensors` | its weights, by the names of `vae.HierarchicalVAE` |
| `prior/config.json` | options of the score-based prior (`PriorConfig`) |
| `prior/model.safetensors` | its weights, by the names of `lsgm.score.MixedNormalScore` |

A plain VAE has no prior. `python scripts/import_checkpoint.py auto DIR --out RUN` makes a run of
it that computes the same to the last bit.
"""


def export_parts(model: VAEModel, data: DataConfig, out: str | Path) -> str:
    """Write the folder ``out``; returns what it is.

    Raises:
        UserError: ``out`` is there.
    """
    described = model.describe()
    index: dict[str, Any] = {
        "_class_name": CLASS,
        "_lsgm_version": lsgm.__version__,
        "autoencoder": ["vae", "HierarchicalVAE"],
        "spec": described["spec"],
        "data": asdict(data),
    }
    if isinstance(model, LSGM):
        index["prior"] = ["lsgm", "MixedNormalScore"]
    with new_folder(out) as path:
        write_part(path, (INDEX, index))
        atomic_write_text(path / "README.md", README)
        weights = WEIGHTS, model.vae.state_dict()
        write_part(path / "autoencoder", (CONFIG, described["vae"]), weights)
        if isinstance(model, LSGM):
            weights = WEIGHTS, model.score.state_dict()
            write_part(path / "prior", (CONFIG, described["prior"]), weights)
    return f"{out}: autoencoder{' and prior' if isinstance(model, LSGM) else ''} in safetensors"
