"""The settings of a run, read from TOML files and the command line, and written back as TOML.

Values of a TOML file are checked here and never converted; jsonargparse reads the texts of the
command line, which carry no types of their own, and writes --help.
"""

import argparse
import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import jsonargparse
import tomli_w

from poweropd_megatron.config.objective import unused_settings
from poweropd_megatron.config.objective_rules import of_objective, refuse_unused, settled
from poweropd_megatron.config.rules import check
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.config.settings import (
    SETTINGS,
    TABLES,
    conforms,
    describe,
    not_a_setting,
    wrong_type,
)
from poweropd_megatron.environment import world_size
from poweropd_megatron.errors import ConfigError

_DESCRIPTION = """\
Distil a teacher into a student. The command line wins over --config. Its values are written as in
TOML, but strings without quotes, and null for a setting that is to be left out.

  poweropd train --config launch/recipes/chain_sum.toml --optimizer.lr 1e-3
  poweropd train --config my.toml --data.train_files '["a.jsonl", "b.jsonl"]' --print_config
"""


_TABLES_OF_ENTRIES = ("student.megatron", "teacher.megatron")
"""Settings that are tables, whose entries the command line may also give one by one."""


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of a run from --config files and dotted overrides.

    Of several --config files a later one wins; the command line wins over all of them, see settled.
    The result satisfies rules.check, for torchrun's number of ranks where WORLD_SIZE tells it.

    Raises: ConfigError with one message that names the setting, the value and what is expected.
    SystemExit(0) after --help or --print_config.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--print_config", action="store_true")
    first.add_argument("-h", "--help", action="store_true")
    try:
        options, overrides = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if options.help:
        print(_parser().format_help(), end="")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for path in options.config:
        layer = read_toml(Path(path))
        values = settled(values | layer, values, layer)
    overridden = override(values, overrides)
    values = settled(overridden, values, {name for name, _ in _given(overrides)})
    config = train_config(values)
    refuse_unused(of_objective(values), dataclasses.asdict(config.objective))
    check(config, world_size=world_size())
    if options.print_config:
        print(to_toml(config), end="")
        raise SystemExit(0)
    return config


def to_toml(config: TrainConfig) -> str:
    """Return as TOML every setting with an effect that isn't None; it reads as the same again."""
    tables = dataclasses.asdict(config)
    for name in unused_settings(tables["objective"]):
        del tables["objective"][name]
    return tomli_w.dumps(_without_none(tables))


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file by dotted name, of exactly the types of the schema.

    Raises: ConfigError if the file can't be read, isn't TOML, or holds an unknown name or a value
    of another type (an int is taken for a float; nothing else is converted).
    """
    return flat_settings(parse_toml(path), place=str(path))


def parse_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables. Raises: ConfigError if it can't be read, or isn't TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config {path}: no such file (seen from {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} can't be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def flat_settings(table: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    """Return the settings of a table in the shape of the schema by dotted name, types checked.

    Raises: ConfigError, after the place that the table is from, as read_toml does.
    """
    values = dict(_flatten(table))
    for name, value in values.items():
        if name not in SETTINGS:
            raise ConfigError(f"{place}: {not_a_setting(name)}")
        if not conforms(value, SETTINGS[name].type):
            raise ConfigError(f"{place}: {wrong_type(SETTINGS[name], repr(value))}")
    return values


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run from values of the right types by dotted name; unchecked."""
    config: TrainConfig = _build(TrainConfig, values)
    return config


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = prefix + key
        if name in SETTINGS or not isinstance(value, dict):
            yield name, value
        elif value:
            yield from _flatten(value, name + ".")
        elif name not in TABLES:
            yield name, value


def override(values: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return every setting by dotted name: a command line's, else that of values, else its default.

    Raises: ConfigError for a malformed command line, and for a required setting that neither has.
    """
    argv, entries = _without_entries(argv)
    for name, _ in _given(argv):
        if name not in SETTINGS:
            raise ConfigError(not_a_setting(name))
    namespace = jsonargparse.Namespace()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        namespace[name] = value
    try:
        # Given as defaults instead, a "5" of the files would come back as 5.
        parsed = _parser().parse_args(list(argv), namespace=namespace, defaults=False)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), argv)) from error
    settings = {name: parsed[name] for name in SETTINGS if name in parsed}
    for table, key, value in entries:
        changed = dict(settings.get(table, {}))
        changed.pop(key, None)
        settings[table] = changed if value is None else changed | {key: value}
    return settings


def _without_entries(
    argv: Sequence[str],
) -> tuple[list[str], list[tuple[str, str, Any]]]:
    """Return a command line without --student.megatron.NAME VALUE and the like, and these.

    An entry is its table's setting, its name and its value; None leaves it out.
    """
    rest: list[str] = []
    entries = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        option, equals, text = argument.removeprefix("--").partition("=")
        table, _, key = option.rpartition(".")
        if not argument.startswith("--") or table not in _TABLES_OF_ENTRIES or not key:
            rest.append(argument)
            continue
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise ConfigError(f"--{option} needs a value (write --{option}=VALUE)")
            text = arguments.pop(0)
        entries.append((table, key, _entry(text)))
    return rest, entries


def _entry(text: str) -> Any:
    """Return a value as TOML has it, or the text where it isn't TOML, such as a bare word."""
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _given(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line with their texts, None where one has none."""
    for argument, following in zip(argv, [*argv[1:], "-"], strict=False):
        if argument.startswith("--") and argument != "--":
            name, equals, text = argument.removeprefix("--").partition("=")
            absent = None if following.startswith("-") else following
            yield name.removesuffix("+"), text if equals else absent


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's types and defaults, with the line breaks of the description."""


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="poweropd train",
        usage="poweropd train --config FILE.toml [--SETTING VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=_HelpFormatter,
        parser_mode="toml",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.toml",
        default=argparse.SUPPRESS,
        help="File with settings; of several a later one wins.",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print every setting as TOML, ready for --config, and exit.",
    )
    tables = {name: parser.add_argument_group(name or "run", text) for name, text in TABLES.items()}
    for name, setting in SETTINGS.items():
        tables[setting.table].add_argument(
            f"--{name}",
            type=_InlineTable() if get_origin(setting.type) is dict else setting.type,
            required=setting.required,
            default=None if setting.required else setting.default,
            help=setting.help,
        )
    return parser


class _InlineTable:
    """The type of a table, with a name for --help."""

    def __repr__(self) -> str:
        return "table"

    def __call__(self, value: str | dict[str, Any]) -> dict[str, Any]:
        """Return a table of the command line; jsonargparse also passes those of files through."""
        table = tomllib.loads(f"table = {value}")["table"] if isinstance(value, str) else value
        if not isinstance(table, dict):
            raise ValueError(f"not a table: {value}")
        return table


def _explain(message: str, argv: Sequence[str]) -> str:
    """Return jsonargparse's message about a command line as one that names setting and value."""
    if missing := re.search(r"arguments are required: (.*)", message):
        example = missing[1].partition(",")[0]
        return f"no value for {missing[1]}: set it in a --config file, or with --{example} VALUE"
    if stray := re.search(r"unrecognized arguments: (.*)", message):
        return f"{stray[1]}: not understood; settings are given as --NAME VALUE or --NAME=VALUE"
    found = re.search(r'(?:argument --|Parser key ")([\w.]+)', message)
    if found is None:
        return message
    setting = SETTINGS[found[1]]
    text = [text for name, text in _given(argv) if name == setting.name][-1]
    if text is None:
        return (
            f"--{setting.name} needs a value: {describe(setting.type)} "
            f"(write --{setting.name}=VALUE if it starts with a minus)"
        )
    return wrong_type(setting, repr(text))


def _build(cls: type, values: Mapping[str, Any], table: str = "") -> Any:
    fields: dict[str, Any] = {}
    for field, kind in get_type_hints(cls).items():
        name = f"{table}.{field}".lstrip(".")
        if name in TABLES:
            fields[field] = _build(kind, values, name)
        elif name in values:
            fields[field] = float(values[name]) if kind is float else values[name]
    return cls(**fields)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
