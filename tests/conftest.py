"""Fixtures for inputs that lie outside the repository; tests that need them skip without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
# A shell starts background jobs with SIGINT ignored, nohup with SIGHUP, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _folder_from(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable} names {folder}, which is not a folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packed data and features go to a folder of the tests, unless the environment names one."""
    with pytest.MonkeyPatch.context() as patch:
        if "LSGM_CACHE" not in os.environ:
            patch.setenv("LSGM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: MNIST/raw/, omniglot/chardata.mat and others."""
    return _folder_from("LSGM_DATA")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Reference arrays of the published system."""
    return _folder_from("LSGM_PARITY_DIR")
