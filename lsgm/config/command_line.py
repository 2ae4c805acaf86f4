"""Reading configurations from YAML files and the command line, and writing them.

Three layers, later ones win: the defaults of the schema (:mod:`lsgm.config.training`), a YAML file
(read by OmegaConf), and ``--section.key value`` (:mod:`lsgm.config.overrides`). Every mistake
becomes one :class:`~lsgm.errors.UserError` line that names the key, the file and the nearest valid
key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lsgm.config.checks import check_values
from lsgm.config.keys import misfit, schema_keys, suggestion
from lsgm.config.overrides import Option, apply_overrides, parse_tokens, split_plain
from lsgm.config.training import RETIRED_KEYS, LSGMTrainConfig, NCSNTrainConfig, VAETrainConfig
from lsgm.errors import UserError
from lsgm.system.files import atomic_write_text
from lsgm.system.integrity import sign, signed_text

__all__ = [
    "CONFIG_FILE",
    "CommandLine",
    "LSGM_RUN",
    "OUT",
    "RESUME",
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
    """Return a configuration from a YAML file (None: the defaults) and command-line tokens.

    Raises:
        UserError: For a file that cannot be read, an unknown key, or a value that does not fit.
    """
    config = config_class() if path is None else _read_yaml(config_class, Path(path))
    return apply_overrides(config, overrides) if overrides else config


def load_run_config(run: str | Path) -> VAETrainConfig | LSGMTrainConfig | NCSNTrainConfig:
    """Return the configuration of a run folder, of any kind.

    Raises:
        UserError: If the folder has no readable config.yaml.
    """
    path = Path(run) / CONFIG_FILE
    keys = _read_mapping(path)
    if "score" in keys:
        return _build(NCSNTrainConfig, keys, path)
    if "prior" in keys:
        return _build(LSGMTrainConfig, keys, path)
    return _build(VAETrainConfig, keys, path)


def save_config(config: Any, path: str | Path) -> None:
    """Write a configuration dataclass as YAML that :func:`load_config` reads, below its SHA-256;
    the file appears whole or not at all.
    """
    atomic_write_text(Path(path), sign(OmegaConf.to_yaml(OmegaConf.structured(config))))


def run_folder(
    config: VAETrainConfig | LSGMTrainConfig | NCSNTrainConfig, out: str | Path | None = None
) -> Path:
    """Return the folder a run is written to: `out`, or runs/NAME."""
    return Path(out) if out is not None else Path("runs") / config.name


def take_data_from_run(config: LSGMTrainConfig, options: dict[str, Any]) -> LSGMTrainConfig:
    """Fill in `vae_run` from ``--vae`` or `lsgm_run` from ``--lsgm``, and, where nothing else is
    said, the data section of that run.

    Raises:
        UserError: If no run is named, or two, or it is not one.
    """
    written = run_folder(config, options.get("out")) / CONFIG_FILE
    if options.get("resume") and written.is_file():
        begun = load_config(LSGMTrainConfig, written)
        if not (options.get("vae") or options.get("lsgm")):
            config = dataclasses.replace(config, vae_run=begun.vae_run, lsgm_run=begun.lsgm_run)
        config = dataclasses.replace(config, data=config.data or begun.data)
    named = {f"{kind}_run": options.get(kind) for kind in ("vae", "lsgm")}
    if not any(named.values()):
        named = {"vae_run": config.vae_run, "lsgm_run": config.lsgm_run}
    runs = [run for run in named.values() if run is not None]
    if not runs:
        raise UserError("--vae: give the folder of a finished VAE run, for example --vae runs/vae")
    if len(runs) > 1:
        raise UserError(f"--vae, --lsgm: give one run to start from, not both {' and '.join(runs)}")
    config = dataclasses.replace(config, **named)
    if config.data is not None:
        return config
    return dataclasses.replace(config, data=load_run_config(runs[0]).data)


def parse_command_line(
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    extra: Sequence[Option] = (OUT, RESUME),
    default_config: str | Path | None = None,
    prepare: Callable[[T, dict[str, Any]], T] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> CommandLine[T]:
    """Parse ``[--config FILE] [plain options] [--section.key value ...]``.

    ``--help`` prints every field with its unit and default and exits with code 0. With ``--resume``
    and no ``--config``, the configuration that the run folder holds takes the place of
    `default_config`.

    Args:
        config_class: The schema.
        argv: Arguments without the program's name; None: those of this process.
        extra: Plain options beside ``--config``.
        default_config: YAML file used when ``--config`` is absent.
        prepare: Called with the configuration before overrides and the options; returns the
            configuration to override.
        prog: Program name in the help text.
        description: First lines of the help text.

    Raises:
        UserError: For an unknown option or key, or a value that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    config_option = Option(
        "config", "YAML file whose values replace the defaults", "FILE", _text(default_config)
    )
    plain = (config_option, *extra)
    wants_help = any(token in ("-h", "--help") for token in argv)
    options, overrides = split_plain(argv, plain, config_class, wants_help)
    given = options.pop("config")
    chosen = given or default_config
    path = Path(chosen) if chosen else None
    config = load_config(config_class, path)
    if given is None and options.get("resume"):
        written = run_folder(config, options.get("out")) / CONFIG_FILE  # type: ignore[arg-type]
        if written.is_file():
            path, config = written, load_config(config_class, written)
        elif any((written.parent / "checkpoints").glob("*.pt")):
            raise UserError(f"{written}: missing; give the run's configuration as --config")
    if wants_help:
        parse_tokens(config, ["--help"], plain, prog, description or config_class.__doc__)
    if prepare is not None:
        config = prepare(config, options)
    return CommandLine(apply_overrides(config, overrides), options, path)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _read_yaml(config_class: type[T], path: Path) -> T:
    return _build(config_class, _read_mapping(path), path)


def _read_mapping(path: Path) -> DictConfig:
    try:
        text = signed_text(path.read_text("utf-8"))
        keys = OmegaConf.create(text)
        mentions = _mentions_environment(OmegaConf.to_container(keys, resolve=False))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a YAML file is needed") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error
    except RecursionError:
        raise UserError(f"{path}: cannot be read (RecursionError: nested too deeply)") from None
    except (ValueError, OverflowError) as error:  # a signature or a value of YAML's own types
        raise UserError(f"{path}: {_one_line(error)}") from error
    if mentions:
        raise UserError(f"{path}: ${{...}} is not expanded; write what it stands for")
    if not isinstance(keys, DictConfig) or not keys:
        raise UserError(f"{path}: must hold 'key: value' lines")
    return keys


def _mentions_environment(value: Any) -> bool:
    """Whether a reference ``${...}``, which OmegaConf would expand, is in a plain value."""
    if isinstance(value, dict):
        return any(_mentions_environment(part) for item in value.items() for part in item)
    if isinstance(value, list):
        return any(map(_mentions_environment, value))
    return isinstance(value, str) and "${" in value


def _build(config_class: type[T], keys: DictConfig, path: Path) -> T:
    schema = OmegaConf.structured(config_class)
    valid = schema_keys(config_class)
    for key in list(_leaves(keys)):
        if key in RETIRED_KEYS:
            section, _, name = key.rpartition(".")
            OmegaConf.select(keys, section).pop(name)
        elif key not in valid and not any(name.startswith(f"{key}.") for name in valid):
            raise UserError(f"{path}: unknown key {key}{suggestion(key, valid)}")
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(schema, keys))
        with _naming_sections(merged, path):
            config = typing.cast(T, OmegaConf.to_object(merged))
            check_values(config)
        return config
    except OmegaConfBaseException as error:
        for key in _leaves(keys):  # OmegaConf does not always name the key: find it
            value = OmegaConf.select(keys, key)
            try:
                OmegaConf.merge(schema, _nested(key, value))
            except OmegaConfBaseException:
                raise UserError(f"{path}: {misfit(key, value, valid)}") from error
        raise UserError(f"{path}: {_one_line(error)}") from error


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of everything in a mapping that is not itself a mapping."""
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            yield from _leaves(child, f"{key}.")
        else:
            yield key


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the key "a.b"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@contextlib.contextmanager
def _naming_sections(merged: DictConfig, path: Path) -> Iterator[None]:
    """Turn a section's ValueError("field: ...") into a UserError with file and section."""
    try:
        yield
    except ValueError as error:
        section = _failing_section(merged)
        raise UserError(f"{path}: {section}{_one_line(error)}") from error


def _failing_section(merged: DictConfig, prefix: str = "") -> str:
    for name in map(str, merged):
        child = merged[name]
        if isinstance(child, DictConfig):
            try:
                OmegaConf.to_object(child)
            except ValueError:
                return _failing_section(child, f"{prefix}{name}.")
    return prefix


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
