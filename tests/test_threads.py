"""How threads wait is set before PyTorch is loaded, in every script, and the user's choice wins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# Runs a script up to its first import of PyTorch, and says how threads will wait there.
UNTIL_TORCH = f"""
import importlib.abc, os, runpy, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(*(os.environ.get(name) for name in {NAMES}), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


COMMANDS = {
    "benchmark": ["train"],
    "edit": ["reconstruct"],
    "import_checkpoint": ["official-lsgm"],
    "export_checkpoint": ["run", "--to", "diffusers", "--out", "x"],
}


def settings_at_torch(script: Path, **environment: str) -> list[str]:
    clean = {key: value for key, value in os.environ.items() if key not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, script, *COMMANDS.get(script.stem, ())],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_every_script_sets_it_before_it_loads_pytorch(script):
    assert settings_at_torch(script) == ["None", "1000", "1"]


@pytest.mark.parametrize(("name", "value"), [*zip(NAMES, ("active", "77", "200"), strict=True)])
def test_the_users_choice_wins(name, value):
    expected = [value if name == other else "None" for other in NAMES]
    assert settings_at_torch(ROOT / "scripts" / "sample.py", **{name: value}) == expected
