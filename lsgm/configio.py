"""Reading configurations from YAML files and the command line, and writing them.

Three layers, later ones win: the defaults of the schema (:mod:`lsgm.config`), a YAML file (read by
OmegaConf), and ``--section.key value`` (parsed by tyro). Every mistake becomes one
:class:`~lsgm.errors.UserError` line that names the key, the file and the nearest valid key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro
import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lsgm.config import RETIRED_KEYS, LSGMTrainConfig, VAETrainConfig
from lsgm.config_data import NCSNTrainConfig
from lsgm.configkeys import describe, misfit, schema_keys, section_class, suggestion
from lsgm.errors import UserError
from lsgm.files import atomic_write_text

__all__ = [
    "CONFIG_FILE",
    "LSGM_RUN",
    "OUT",
    "RESUME",
    "VAE_RUN",
    "CommandLine",
    "Option",
    "load_config",
    "load_run_config",
    "parse_command_line",
    "run_folder",
    "save_config",
    "take_data_from_run",
]

CONFIG_FILE = "config.yaml"
T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """A plain command-line option beside the configuration.

    Attributes:
        name: Name without dashes.
        help: What it does.
        metavar: Shown for the value; None makes the option a switch.
        default: Its value when absent; a switch is off.
    """

    name: str
    help: str
    metavar: str | None = None
    default: str | None = None

    @property
    def is_switch(self) -> bool:
        return self.metavar is None


OUT = Option("out", "run folder to write; default runs/NAME", "DIR")
RESUME = Option("resume", "continue the run in the run folder")
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
    return _apply(config, overrides) if overrides else config


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
    """Write a configuration dataclass as YAML that :func:`load_config` reads; the file appears
    whole or not at all.
    """
    atomic_write_text(Path(path), OmegaConf.to_yaml(OmegaConf.structured(config)))


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
    options, overrides = _split_plain(argv, plain, config_class, wants_help)
    given = options.pop("config")
    chosen = given or default_config
    path = Path(chosen) if chosen else None
    config = load_config(config_class, path)
    if given is None and options.get("resume"):
        written = run_folder(config, options.get("out")) / CONFIG_FILE  # type: ignore[arg-type]
        if written.is_file():
            path, config = written, load_config(config_class, written)
    if wants_help:
        _parse(config, ["--help"], plain, prog, description or config_class.__doc__)
    if prepare is not None:
        config = prepare(config, options)
    return CommandLine(_apply(config, overrides), options, path)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _read_yaml(config_class: type[T], path: Path) -> T:
    return _build(config_class, _read_mapping(path), path)


def _read_mapping(path: Path) -> DictConfig:
    try:
        keys = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a YAML file is needed") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error
    if not isinstance(keys, DictConfig):
        raise UserError(f"{path}: must hold 'key: value' lines")
    return keys


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
            return typing.cast(T, OmegaConf.to_object(merged))
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


def _groups(tokens: Sequence[str]) -> list[list[str]]:
    """Split tokens into one group per option: the option's name and its values (``--a=b`` counts as
    two tokens).
    """
    groups: list[list[str]] = []
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token.partition("=")
            groups.append(
                [name.replace("-", "_").replace("__", "--", 1)] + ([value] if equals else [])
            )
        elif groups:
            groups[-1].append(token)
        else:
            raise UserError(f"unexpected argument {token!r}; options look like --section.key value")
    return groups


def _split_plain(
    argv: Sequence[str], plain: Sequence[Option], config_class: type, wants_help: bool
) -> tuple[dict[str, Any], list[str]]:
    """Take the plain options out of the tokens and check that all other names are keys of the
    schema.
    """
    by_flag = {f"--{option.name}": option for option in plain}
    options: dict[str, Any] = {option.name: False if option.is_switch else None for option in plain}
    overrides: list[str] = []
    valid = schema_keys(config_class)
    for flag, *values in _groups([token for token in argv if token not in ("-h", "--help")]):
        option = by_flag.get(flag)
        if option is not None:
            if len(values) != (0 if option.is_switch else 1):
                needed = (
                    "takes no value" if option.is_switch else f"needs one value ({option.metavar})"
                )
                raise UserError(f"{flag} {needed}, not {' '.join(values) or 'none'}")
            options[option.name] = True if option.is_switch else values[0]
        elif flag[2:] in valid:
            overrides += [flag, *_yaml_words(valid[flag[2:]], values)]
        elif not wants_help:
            names = [*valid, *(option.name for option in plain)]
            raise UserError(
                f"unknown option {flag}{suggestion(flag[2:], names).replace('mean ', 'mean --')}"
            )
    return options, overrides


def _yaml_words(hint: Any, values: list[str]) -> list[str]:
    """Accept true, false and null as YAML writes them, and a bare switch as true."""
    kinds = {hint, *typing.get_args(hint)}
    if bool in kinds and not values:
        return ["True"]
    words = {"true": "True", "false": "False"} if bool in kinds else {}
    if types.NoneType in kinds:
        words |= {"null": "None", "none": "None"}
    return [words.get(value.lower(), value) for value in values]


def _apply(config: T, overrides: Sequence[str]) -> T:
    """Return `config` with command-line overrides; raises UserError."""
    _, tokens = _split_plain(overrides, (), type(config), False)
    if not tokens:
        return config
    try:
        return _parse(config, tokens)
    except _ParseFailure as failure:
        raise UserError(_explain(config, tokens, str(failure))) from None


class _ParseFailure(Exception):
    """tyro refused the tokens; the message is the first paragraph of what it would have printed."""


def _explain(config: Any, tokens: Sequence[str], message: str) -> str:
    """Return the line for tokens that tyro refused with `message`."""
    constraint = re.match(r"Error parsing experiment\.?(\S*): (\w+: .*)", message)
    if constraint:
        section, rest = constraint.groups()
        return f"--{section}.{rest}" if section else f"--{rest}"
    valid = schema_keys(type(config))
    for flag, *values in _groups(tokens):
        try:
            _parse(config, [flag, *values])
        except _ParseFailure:
            if not values:
                return f"{flag}: needs a value (wanted: {describe(valid[flag[2:]])})"
            return f"--{misfit(flag[2:], ' '.join(values), valid)}"
    return message


def _parse(
    config: T,
    tokens: Sequence[str],
    plain: Sequence[Option] = (),
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """Run tyro over the schema with `config` as defaults; exits only for ``--help``."""
    config = _open_sections(config, tokens)
    fields: list[tuple[str, Any, Any]] = [
        (
            option.name,
            Annotated[
                bool if option.is_switch else str | None,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.arg(help=option.help, metavar=option.metavar),
            ],
            False if option.is_switch else option.default,
        )
        for option in plain
    ]
    # The empty name puts the sections at the top level.
    experiment = Annotated[  # type: ignore[valid-type]  # a type known at run time only
        type(config),
        tyro.conf.arg(name=""),
        tyro.conf.FlagConversionOff,
        tyro.conf.AvoidSubcommands,
    ]
    fields.append(("experiment", experiment, dataclasses.field(default=MISSING)))
    wrapper = dataclasses.make_dataclass("CommandLineFields", fields, frozen=True)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                wrapper,
                prog=prog,
                description=description or "",
                args=list(tokens),
                default=wrapper(experiment=config),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _ParseFailure(_first_paragraph(printed.getvalue())) from None
    except ValueError as error:  # of the outermost dataclass; those of sections tyro prints
        raise _ParseFailure(f"Error parsing experiment: {error}") from None
    return typing.cast(T, parsed.experiment)


def _first_paragraph(box: str) -> str:
    """Return the first paragraph inside the box, of line-drawing or ASCII, that tyro prints."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if set(text) - set("─-+╰╯"):
            lines.append(text)
        elif lines:
            break
    return " ".join(lines)


def _open_sections(config: T, tokens: Sequence[str]) -> T:
    """Replace sections that are None by their defaults where the tokens (or ``--help``) ask for
    their keys.
    """
    hints = typing.get_type_hints(type(config))
    opened = {
        item.name: section()
        for item in dataclasses.fields(config)  # type: ignore[arg-type]
        if getattr(config, item.name) is None
        and (section := section_class(hints[item.name])) is not None
        and any(token == "--help" or token.startswith(f"--{item.name}.") for token in tokens)
    }
    return dataclasses.replace(config, **opened) if opened else config  # type: ignore[type-var]
