"""The public names of ``lsgm``: imported late, seen by type checkers, and all there."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lsgm

PACKAGE = Path(lsgm.__file__).parent


def names_for_type_checkers() -> dict[str, str]:
    """The imports of ``lsgm/__init__.py`` that run for type checkers only: name and module."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    # `X as X`: what a typed package hands on
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def test_type_checkers_see_the_same_names():
    assert names_for_type_checkers() == lsgm._HOMES
    assert (PACKAGE / "py.typed").is_file() and (PACKAGE.parent / "vae" / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(lsgm._HOMES))
def test_every_name_is_that_of_its_module_and_documented(name):
    value = getattr(lsgm, name)
    assert value is getattr(import_module(lsgm._HOMES[name]), name)
    assert name in dir(lsgm) and name in lsgm.__all__
    assert getattr(value, "__name__", name) == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lsgm' has no attribute 'Sampel'"):
        lsgm.Sampel  # noqa: B018


def test_importing_the_package_loads_no_library():
    heavy = {"torch", "numpy", "omegaconf", "matplotlib"}
    code = f"import sys, lsgm; dir(lsgm); sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
