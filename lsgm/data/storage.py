"""Where data files lie, and how missing ones are fetched without leaving half a file behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

from lsgm.errors import UserError

__all__ = ["data_root", "download_file", "fetch_into"]

TIMEOUT_SECONDS = 60.0


def data_root(root: str | None) -> Path:
    """Return `root` if given, else the environment variable LSGM_DATA, else ~/.cache/lsgm."""
    return Path(root or os.environ.get("LSGM_DATA") or "~/.cache/lsgm").expanduser()


def fetch_into(target: Path, fetch: Callable[[Path], None], advice: str) -> None:
    """Create `target`, a file or a folder, in one step.

    `fetch` gets a fresh folder on the same file system and creates ``folder / target.name``, which
    is then renamed. Processes that fetch at the same time do the work twice and agree on the
    result.

    Args:
        target: What to create.
        fetch: Does the work in the folder it is given.
        advice: What the user can do by hand if it fails.

    Raises:
        UserError: If the network or the disk does not allow it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            fetch(Path(folder))
            try:
                os.replace(Path(folder) / target.name, target)
            except OSError:
                if (
                    not target.exists()
                ):  # a folder that another process has put there is as good as ours
                    raise
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{target} is missing and could not be fetched ({reason}); {advice}"
        ) from error


def download_file(url: str, path: Path) -> None:
    """Download `url` to `path`; raises OSError."""
    request = urllib.request.Request(url, headers={"User-Agent": "lsgm"})
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response,
        path.open("wb") as file,
    ):
        shutil.copyfileobj(response, file)
