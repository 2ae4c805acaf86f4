"""What the README shows in Python runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import lsgm

README = Path(__file__).parents[1] / "README.md"


def test_own_parts_run_as_the_readme_shows(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(
        r"<!-- run by tests/test_readme.py -->\n```python\n(.*?)```", README.read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["x"].shape == (16, 2)
    assert "nats per item" in capsys.readouterr().out
    assert isinstance(names["again"], lsgm.ScoreModel)
