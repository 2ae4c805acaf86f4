"""Import torchvision even where its compiled operators do not load.

A torchvision wheel built for another variant of PyTorch (a CUDA build beside a CPU one) fails on
import with "operator torchvision::nms does not exist", although its datasets, transforms and image
grids are plain Python. Declaring the missing operator is enough for those; calling the operator
itself still fails, as it should.
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

__all__ = [
    "import_torchvision",
]

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")


# Declarations last as long as the library object that made them.
_libraries: list[torch.library.Library] = []


def import_torchvision(submodule: str = "") -> ModuleType:
    """Return torchvision or one of its submodules.

    Args:
        submodule: For example "datasets" or "utils"; empty for the package.

    Raises:
        ImportError: If torchvision is not installed.
        RuntimeError: If it fails to import for another reason than missing compiled operators.
    """
    name = f"torchvision.{submodule}" if submodule else "torchvision"
    declared: set[str] = set()
    while True:
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            match = _MISSING.search(str(error))
            if match is None or match[1] in declared:
                raise
            declared.add(match[1])
            _declare(match[1])
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]


def _declare(operator: str) -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(f"{operator}(...) -> Tensor")
    _libraries.append(library)
