"""The command ``configs``: the configurations that come with the library."""

from __future__ import annotations

from collections.abc import Sequence

from lsgm.config.packaged import config_summary, packaged_configs, suggest_config
from lsgm.errors import UserError

__all__ = ["configs"]


def configs(argv: Sequence[str], prog: str) -> None:
    """List the configurations by name, which --config of the other commands takes. With names:
    print those, to be changed and given to --config as files.
    """
    known = packaged_configs()
    if any(word in ("-h", "--help", "--help-all") for word in argv):
        print(f"usage: {prog} [NAME ...]\n\n{configs.__doc__}")
    elif not argv:
        width = max(map(len, known), default=0)
        print("\n".join(f"{name:{width}}  {config_summary(known[name])}" for name in known))
    elif unknown := [name for name in argv if name not in known]:
        raise UserError(f"{unknown[0]}: no such configuration{suggest_config(unknown[0])}")
    else:
        print("".join(known[name].read_text("utf-8") for name in argv), end="")
