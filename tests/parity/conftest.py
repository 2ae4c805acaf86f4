"""The files that the parity tests read: those of ``LSGM_PARITY_DIR``, and those made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_fixtures import OwnFile


@pytest.fixture
def path(request: pytest.FixtureRequest, own_folder: Path) -> Path | None:
    """A given file as it is; one of our own is written on first use."""
    wanted: Path | OwnFile | None = request.param
    return wanted.written(own_folder) if isinstance(wanted, OwnFile) else wanted


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own_fixtures")
