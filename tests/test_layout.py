"""The house: imports run downwards only, and no two modules need each other.

Every import counts, also those inside functions and those for type checkers; of the public names in
``lsgm/__init__.py`` only those that run when it is imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = """
    vae
    lsgm.errors lsgm.tensors lsgm.bisection lsgm.registry
    lsgm.system
    lsgm
    lsgm.sde
    lsgm.weighting lsgm.divergence lsgm.discrete_noise
    lsgm.times
    lsgm.noise_ladder
    lsgm.score
    lsgm.solvers lsgm.networks
    lsgm.conditioning lsgm.objectives lsgm.likelihood lsgm.path_bound
    lsgm.score_matching
    lsgm.config
    lsgm.data
    lsgm.models
    lsgm.sampling
    lsgm.evaluation lsgm.evaluation.likelihood lsgm.evaluation.quality
    lsgm.evaluation.report
    lsgm.training
    lsgm.training.stages
    lsgm.training.evaluation
    lsgm.training.runs
    lsgm.training.fit
    lsgm.importers lsgm.benchmark
    lsgm.exporters
    lsgm.commands
    scripts
"""
"""The rooms, a floor a line, the lowest first. A room imports from lower floors and from itself;
what stands in no room of its own belongs to the one around it.
"""

FLOOR = {room: k for k, line in enumerate(FLOORS.split("\n")) for room in line.split()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {
    module_name(path): path
    for top in ("vae", "lsgm", "scripts")
    for path in sorted((ROOT / top).rglob("*.py"))
}


def imported_names(node: ast.AST, whole: bool = True) -> Iterator[str]:
    """Yield what the imports below a node name; without ``whole``, not those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif whole or not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from imported_names(child, whole)


def module_of(name: str) -> str | None:
    """The module of ours that holds an imported name, or is it; None for other libraries."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def imports_of(name: str, path: Path) -> set[str]:
    names = imported_names(ast.parse(path.read_text("utf-8")), whole=name != "lsgm")
    return {found for found in map(module_of, names) if found is not None} - {name}


IMPORTS = {name: imports_of(name, path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """The innermost room that a module stands in."""
    room = module
    while room not in FLOOR:
        room = room.rpartition(".")[0]
        assert room not in ("", "lsgm"), f"{module}: give it a room in FLOORS"
    return room


def test_every_room_is_there():
    assert set(FLOOR) <= set(MODULES) | {module.rpartition(".")[0] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    room = room_of(module)
    upward = [
        other
        for other in sorted(IMPORTS[module])
        if room_of(other) != room and FLOOR[room_of(other)] >= FLOOR[room]
    ]
    assert upward == [], f"{room} stands below"


def test_no_two_modules_need_each_other():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_order_would_notice():
    """What the checks above read: late imports, those for type checkers, and names of packages."""
    code = """
        if TYPE_CHECKING:
            from lsgm.sde import VPSDE
        def late():
            import lsgm.commands.run
            from lsgm.system import files
    """
    tree = ast.parse("\n".join(line[8:] for line in code.splitlines()))
    found = [module_of(name) for name in imported_names(tree)]
    assert found == ["lsgm.sde", "lsgm.commands.run", "lsgm.system.files"]
    assert room_of("lsgm.training.loop") == "lsgm.training"
    assert room_of("lsgm.training.stages.score") == "lsgm.training.stages"
    with pytest.raises(AssertionError, match="give it a room"):
        room_of("lsgm.attic")
