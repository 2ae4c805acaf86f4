"""One tiny run of each stage, trained once by the scripts and shared by all tests here."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import LSGM_CONFIG, VAE_CONFIG, TinyRuns, call

from lsgm.training.runs import latent as training_runs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRuns:
    root = tmp_path_factory.mktemp("tiny")
    (root / "tiny-vae.yaml").write_text(VAE_CONFIG)
    (root / "tiny-lsgm.yaml").write_text(LSGM_CONFIG)
    models: dict[str, torch.nn.Module] = {}
    made = TinyRuns(root, root / "vae", root / "lsgm", models)
    original = training_runs.save

    def keep(model, folder, *rest):
        models[model.kind] = copy.deepcopy(model)
        original(model, folder, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_runs, "save", keep)
        for stage in ("vae", "lsgm"):
            outcome = call(*made.command(stage, made.run(stage)))
            assert outcome.code == 0, outcome.err
    return made
