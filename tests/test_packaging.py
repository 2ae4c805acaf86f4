from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {name.split(".")[0] for name in modules}


def test_every_folder_of_modules_is_a_package():
    holders = {path.parent for top in ("lsgm", "vae") for path in (ROOT / top).rglob("*.py")}
    assert [str(f) for f in holders if not (f / "__init__.py").exists()] == []


def test_vae_knows_nothing_of_lsgm():
    assert [p.name for p in (ROOT / "vae").rglob("*.py") if "lsgm" in imported_modules(p)] == []


def test_solvers_know_no_network():
    wrong = [
        path.name
        for path in (ROOT / "lsgm/solvers").glob("*.py")
        if any(
            name in path.read_text()
            for name in (
                "lsgm.networks",
                "lsgm.config.training",
                "lsgm.models.latent",
                "import vae.",
            )
        )
    ]
    assert wrong == []


def test_torchvision_is_imported_only_where_needed():
    modules = "lsgm.commands.run, lsgm.config.command_line, lsgm.data"
    code = f"import sys, {modules}; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
