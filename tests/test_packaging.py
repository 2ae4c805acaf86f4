from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest

from lsgm.commands import edit, evaluate, sample, train
from lsgm.commands.main import COMMANDS
from lsgm.commands.sample import SampleOptions
from lsgm.config.keys import schema_keys
from lsgm.errors import UserError
from lsgm.evaluation.report.options import EvaluateOptions

ROOT = Path(__file__).parents[1]


def test_every_folder_of_modules_is_a_package():
    holders = {path.parent for top in ("lsgm", "vae") for path in (ROOT / top).rglob("*.py")}
    assert [str(f) for f in holders if not (f / "__init__.py").exists()] == []


def test_torchvision_is_imported_only_where_needed():
    modules = "lsgm.commands.run, lsgm.config.command_line, lsgm.data"
    code = f"import sys, {modules}; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The library, built as a wheel and installed in a folder outside the checkout."""
    if not (find_spec("pip") and find_spec("setuptools")):
        pytest.skip("pip and setuptools are not installed")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("lsgm", "vae", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("lsgm-*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def call(site: Path, folder: Path, *command: object) -> str:
    """Run a command of the installed library in a folder; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file(installed):
    for top, pattern in (("lsgm", "*.py"), ("vae", "*.py"), ("configs", "*.yaml")):
        expected = {path.relative_to(ROOT / top) for path in (ROOT / top).rglob(pattern)}
        folder = installed / ("lsgm/configs" if top == "configs" else top)
        assert {path.relative_to(folder) for path in folder.rglob(pattern)} >= expected
    assert (installed / "lsgm" / "py.typed").is_file() and (
        installed / "vae" / "py.typed"
    ).is_file()


def test_the_wheel_works_in_another_folder(installed, tmp_path):
    """It trains by a packaged configuration, opens the run from Python, and samples."""
    lsgm = installed / "bin" / "lsgm"
    assert "digits/vae" in call(installed, tmp_path, lsgm, "configs")
    small = "--vae.num_channels_enc 8 --vae.num_channels_dec 8 --vae.num_latent_per_group 2"
    loop = "--train.max_steps 1 --train.eval_images 8 --train.device cpu --out run"
    train_vae = f"train-vae --config digits/vae {small} {loop}"
    call(installed, tmp_path, lsgm, *train_vae.split())
    snippet = """
        import lsgm, torch
        sde, model = lsgm.VPSDE(), lsgm.load("run")
        times = lsgm.make_grid("log_snr", sde, n=10, t_end=1e-3)
        eps = lambda x, t: x * sde.var(t).sqrt()[:, None]
        x = lsgm.Heun().solve(sde, eps, torch.ones(3, 2), times).x
        print(lsgm.__file__, type(model).__name__, tuple(x.shape))
        """
    printed = call(installed, tmp_path, "-c", textwrap.dedent(snippet))
    assert printed.split(maxsplit=1) == [
        str(installed / "lsgm" / "__init__.py"),
        "VAEModel (3, 2)\n",
    ]


def test_the_programs_help_is_quick():
    """It loads no library, and lists every command."""
    heavy = {"torch", "numpy", "omegaconf"}
    code = (
        "import sys; from lsgm.commands.main import _dispatch; _dispatch(['--help'])\n"
        f"sys.exit(bool({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert [name for name in COMMANDS if f"  {name}" not in done.stdout] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_has_a_summary(name):
    module, _, function = COMMANDS[name].target.partition(":")
    assert list(signature(getattr(import_module(module), function)).parameters)[:2] == [
        "argv",
        "prog",
    ]
    assert COMMANDS[name].summary


def test_every_script_is_a_command():
    commands = {
        script: re.search(r'run_script\("(.+)"\)', script.read_text())
        for script in (ROOT / "scripts").glob("*.py")
    }
    assert all(found is not None and found[1] in COMMANDS for found in commands.values())


@pytest.mark.parametrize(
    ("schema", "shown"),
    [*train.SHOWN.items(), (SampleOptions, sample.SHOWN), (EvaluateOptions, evaluate.SHOWN)],
)
def test_help_shows_about_twenty_options_that_there_are(schema, shown):
    assert set(shown) <= set(schema_keys(schema))
    assert 15 <= len(shown) <= 25


def test_help_of_an_edit_shows_options_that_there_are():
    keys = [set(schema_keys(options)) for options, _ in edit.COMMANDS.values()]
    assert set(edit.SHOWN) <= set.union(*keys)
    assert all(12 <= len(set(edit.SHOWN) & known) <= 25 for known in keys)


def test_a_wrong_name_is_one_line():
    for name, prog in (("edit", "lsgm edit"), ("benchmark", "benchmark.py")):
        with pytest.raises(UserError, match=f"^nothing: no such {name}; known are "):
            COMMANDS[name](["nothing"], prog)
    with pytest.raises(UserError, match="no such configuration; did you mean digits/vae"):
        COMMANDS["configs"](["digits/va"], "lsgm configs")
