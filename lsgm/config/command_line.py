"""Reading configurations from YAML files and the command line, and writing them.

Three layers, later ones win: the defaults of the schema (:mod:`lsgm.config.training`), a YAML file
(:mod:`lsgm.config.layers`), and ``--section.key value`` (:mod:`lsgm.config.overrides`). Every
mistake becomes one :class:`~lsgm.errors.UserError` line that names the key, the file and the
nearest valid key.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, cast

from omegaconf import OmegaConf

from lsgm.config.help import help_text
from lsgm.config.layers import lay_over, read_layer
from lsgm.config.overrides import HELP_ALL_FLAG, HELP_FLAGS, Option, apply_overrides, split_plain
from lsgm.config.packaged import find_config
from lsgm.config.training import RETIRED_KEYS, LSGMTrainConfig, NCSNTrainConfig, VAETrainConfig
from lsgm.errors import UserError
from lsgm.system.files import atomic_write_text
from lsgm.system.integrity import sign

__all__ = [
    "CONFIG_FILE",
    "CommandLine",
    "LSGM_RUN",
    "OUT",
    "RESUME",
    "RunConfig",
    "VAE_RUN",
    "load_config",
    "load_run_config",
    "parse_command_line",
    "run_folder",
    "save_config",
    "take_data_from_run",
]

CONFIG_FILE = "config.yaml"


T = TypeVar("T")


RunConfig: TypeAlias = VAETrainConfig | LSGMTrainConfig | NCSNTrainConfig
"""What a run folder may be trained by."""


OUT = Option("out", "run folder to write; default runs/NAME", "DIR")


RESUME = Option(
    "resume",
    "continue the run in the run folder; --resume auto: start it if there is none, so that the "
    "same command can be repeated until the run is finished",
    words=("auto",),
)


VAE_RUN = Option("vae", "folder of the finished VAE run", "RUN")


LSGM_RUN = Option("lsgm", "folder of a finished LSGM run to go on from, instead of --vae", "RUN")


@dataclass(frozen=True)
class CommandLine(Generic[T]):
    """What a command line said.

    Attributes:
        config: The configuration.
        options: Value of each plain option by name: text or None, and True or False for switches.
        config_path: The YAML file below the overrides, or None.
    """

    config: T
    options: dict[str, Any]
    config_path: Path | None


def load_config(
    config_class: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()
) -> T:
    """Return a configuration from a YAML file and command-line tokens.

    Args:
        config_class: The schema.
        path: The file, or the name of a packaged configuration such as ``omniglot/vae_small``
            (:func:`~lsgm.config.packaged.packaged_configs`). None: the defaults of the schema.
        overrides: As on a command line: ``["--train.epochs", "3"]``.

    Raises:
        UserError: For a file that cannot be read, an unknown key, or a value that does not fit.
    """
    config = config_class() if path is None else _read(config_class, find_config(path), None)
    return apply_overrides(config, split_plain(overrides, (), config_class)[1])


def load_run_config(run: str | Path) -> RunConfig:
    """Return the configuration of a run folder, of any kind.

    Raises:
        UserError: If the folder has no readable config.yaml.
    """
    path = Path(run) / CONFIG_FILE
    keys = read_layer(path)
    schema: type[RunConfig] = VAETrainConfig
    if "score" in keys:
        schema = NCSNTrainConfig
    elif "prior" in keys:
        schema = LSGMTrainConfig
    return lay_over(schema, None, keys, f"{path}: ", RETIRED_KEYS)


def _read(config_class: type[T], path: Path, base: T | None) -> T:
    return lay_over(config_class, base, read_layer(path), f"{path}: ", RETIRED_KEYS)


def save_config(config: Any, path: str | Path) -> None:
    """Write a configuration dataclass as YAML that :func:`load_config` reads, below its SHA-256;
    the file appears whole or not at all.
    """
    atomic_write_text(Path(path), sign(OmegaConf.to_yaml(OmegaConf.structured(config))))


def run_folder(config: RunConfig, out: str | Path | None = None) -> Path:
    """Return the folder a run is written to: ``out``, or runs/NAME."""
    return Path(out) if out is not None else Path("runs") / config.name


def take_data_from_run(config: LSGMTrainConfig, options: dict[str, Any]) -> LSGMTrainConfig:
    """Fill in ``vae_run`` from ``--vae`` or ``lsgm_run`` from ``--lsgm``, and, where nothing else
    is said, the data section of that run.

    Raises:
        UserError: If no run is named, or two, or it is not one.
    """
    written = run_folder(config, options.get("out")) / CONFIG_FILE
    if options.get("resume") and written.is_file():
        begun = load_config(LSGMTrainConfig, written)
        if not (options.get("vae") or options.get("lsgm")):
            config = dataclasses.replace(config, vae_run=begun.vae_run, lsgm_run=begun.lsgm_run)
        config = dataclasses.replace(config, data=config.data or begun.data)
    vae, lsgm = options.get("vae"), options.get("lsgm")
    if not (vae or lsgm):
        vae, lsgm = config.vae_run, config.lsgm_run
    runs = [run for run in (vae, lsgm) if run is not None]
    if not runs:
        raise UserError("--vae: give the folder of a finished VAE run, for example --vae runs/vae")
    if len(runs) > 1:
        raise UserError(f"--vae, --lsgm: give one run to start from, not both {' and '.join(runs)}")
    config = dataclasses.replace(config, vae_run=vae, lsgm_run=lsgm)
    if config.data is not None:
        return config
    return dataclasses.replace(config, data=load_run_config(runs[0]).data)


def parse_command_line(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    extra: Sequence[Option] = (OUT, RESUME),
    default_config: str | Path | None = None,
    base: T | None = None,
    prepare: Callable[[T, dict[str, Any]], T] | None = None,
    prog: str | None = None,
    description: str | None = None,
    shown: Sequence[str] | None = None,
) -> CommandLine[T]:
    """Parse ``[--config FILE] [plain options] [--section.key value ...]``.

    ``--help`` prints the fields in ``shown`` with their units and defaults, ``--help-all`` every
    field; both exit with code 0. With ``--resume`` and no ``--config``, the configuration that the
    run folder holds takes the place of ``default_config``.

    Args:
        config_class: The schema.
        argv: Arguments without the program's name; None: those of this process.
        extra: Plain options beside ``--config``.
        default_config: YAML file, or name of a packaged one, used when ``--config`` is absent.
        base: Configuration below the file, in place of the schema's defaults and of
            ``default_config``.
        prepare: Called with the configuration before overrides and the options; returns the
            configuration to override.
        prog: Program name in the help text; None: of this process.
        description: First lines of the help text; None: the schema's.
        shown: Keys that ``--help`` shows; None: all.

    Raises:
        UserError: For an unknown option or key, or a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = None if default_config is None or base is not None else str(default_config)
    what = "YAML file whose values replace the defaults, or the name of one that comes with lsgm"
    plain = (Option("config", what, "FILE", default), *extra)
    wants_help = any(token in HELP_FLAGS for token in argv)
    options, overrides = split_plain(argv, plain, config_class, wants_help)
    given = options.pop("config")
    chosen = given or default
    path = find_config(chosen) if chosen else None
    config = _read(config_class, path, base) if path else base or config_class()
    if given is None and options.get("resume"):
        written = run_folder(cast(RunConfig, config), options.get("out")) / CONFIG_FILE
        if written.is_file():
            path, config = written, load_config(config_class, written)
        elif any((written.parent / "checkpoints").glob("*.pt")):
            raise UserError(f"{written}: missing; give the run's configuration as --config")
    if wants_help:
        keys = None if HELP_ALL_FLAG in argv else shown
        prog = prog or os.path.basename(sys.argv[0])
        print(help_text(config, plain, prog, description or config_class.__doc__, keys), end="")
        sys.exit(0)
    if prepare is not None:
        config = prepare(config, options)
    return CommandLine(apply_overrides(config, overrides), options, path)
