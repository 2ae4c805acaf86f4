"""The configurations that come with the library, by name: ``omniglot/vae_small``."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from lsgm.config.keys import suggestion

__all__ = ["config_summary", "find_config", "packaged_configs", "suggest_config"]

_LIBRARY = Path(__file__).parents[1]


def packaged_configs() -> dict[str, Path]:
    """The YAML files by name, ``DATASET/MODEL``, in order. They lie in the package where it is
    installed, and at the top of the repository in a checkout.
    """
    inside = _LIBRARY / "configs"
    folder = inside if inside.is_dir() else _LIBRARY.parent / "configs"
    files = sorted(folder.glob("*/*.yaml"))
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a path to one, or the name of a packaged one. What is neither
    comes back as it is.
    """
    if Path(name).is_file():
        return Path(name)
    return packaged_configs().get(str(name), Path(name))


def suggest_config(name: str | Path) -> str:
    """What to add to "no such file": the packaged name that is meant, or where the names are."""
    near = suggestion(str(name), list(packaged_configs()))
    return near if "mean" in near else "; `lsgm configs` lists those that come with the library"


def config_summary(path: Path) -> str:
    """The comment at the top of a YAML file, to the first line that ends a sentence, in 100
    characters at most.
    """
    comment: list[str] = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#") or "".join(comment[-1:]).endswith("."):
            break
        comment.append(line.lstrip("# "))
    return shorten(" ".join(comment).removesuffix("."), 100, placeholder=" ...")
