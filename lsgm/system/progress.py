"""Progress bars, where there is a terminal to draw them on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import IO, Any

from tqdm import tqdm

__all__ = [
    "has_terminal",
    "progress_bar",
]


def has_terminal(stream: IO[str] | None = None) -> bool:
    """Whether a stream (default: stderr) is a terminal with room for a bar. One of 0 columns, as
    serial lines and some launchers have, would show an empty line.
    """
    stream = sys.stderr if stream is None else stream
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no descriptor, or one without a size
        return False


def progress_bar(
    items: Iterable[Any] | None = None,
    desc: str | None = None,
    disable: bool = False,
    **options: Any,
) -> Any:
    """A tqdm bar on stderr, silent where there is no terminal."""
    return tqdm(items, desc, disable=disable or not has_terminal(), **options)
