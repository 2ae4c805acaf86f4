"""What a configuration may name is what the registries hold."""

from __future__ import annotations

import subprocess
import sys
import typing
from pathlib import Path

import pytest

from lsgm.config import names
from lsgm.config.architecture import SDEConfig
from lsgm.config.keys import fits, schema_keys
from lsgm.registry import DATASETS, NETWORKS, PROPOSALS, SDES, WEIGHTINGS, Registry

REGISTRIES = {
    "SDEName": SDES,
    "WeightingName": WEIGHTINGS,
    "ProposalName": PROPOSALS,
    "NetworkName": NETWORKS,
    "DatasetName": DATASETS,
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_a_configuration_names_the_entries(name: str) -> None:
    registry = REGISTRIES[name]
    assert typing.get_args(getattr(names, name)) == tuple(registry)
    for entry in registry:
        assert callable(registry[entry]) and registry.name_of(registry[entry]) == entry
    with pytest.raises(ValueError, match=f"unknown {registry.kind} 'none'; known: "):
        registry["none"]
    assert registry.name_of(Registry) is None


LINE = """
import math
from dataclasses import dataclass
from lsgm.registry import SDES
SDES._places["cosine"] = "own:CosineSDE"  # the line

from lsgm.sde import LinearSDE, make_sde

@dataclass(frozen=True)
class CosineSDE(LinearSDE):
    time_eps: float = 1e-3

    def mean_coef(self, t):
        return (0.49 * math.pi * t).cos()

    def var(self, t):
        return (0.49 * math.pi * t).sin().square()

if __name__ == "__main__":
    import own
    from dataclasses import asdict
    from lsgm.config.architecture import SDEConfig
    from lsgm.config.keys import fits, schema_keys
    assert fits(schema_keys(SDEConfig)["kind"], "cosine")
    sde = make_sde(**asdict(SDEConfig("cosine", time_eps=0.02)))
    assert type(sde) is own.CosineSDE and sde.time_eps == 0.02
"""


def test_a_new_sde_is_one_class_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(LINE)
    root = Path(names.__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {str(tmp_path)!r}]; import runpy; "
    code += f"runpy.run_path({str(tmp_path / 'own.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not fits(schema_keys(SDEConfig)["kind"], "cosine")
