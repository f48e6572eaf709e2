"""The settings of a run, read from TOML files and the command line, and written back as TOML.

Values of a TOML file are checked here and never converted; jsonargparse reads the texts of the
command line, which carry no types of their own, and writes --help.
"""

import argparse
import dataclasses
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import jsonargparse
import tomli_w

from poweropd_megatron.config.command_line import explain, given, parser_of, without_entries
from poweropd_megatron.config.evaluation import check_evaluation
from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.objective import unused_settings
from poweropd_megatron.config.objective_rules import of_objective, refuse_unused, settled
from poweropd_megatron.config.rules import check
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.config.settings import (
    EVALUATION,
    TRAIN,
    Schema,
    conforms,
    wrong_type,
)
from poweropd_megatron.environment import world_size
from poweropd_megatron.errors import ConfigError


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Return the settings of a run from --config files and dotted overrides.

    Of several --config files a later one wins; the command line wins over all of them, see settled.
    The result satisfies rules.check, for torchrun's number of ranks where WORLD_SIZE tells it.

    Raises: ConfigError with one message that names the setting, the value and what is expected.
    SystemExit(0) after --help or --print_config.
    """
    config: TrainConfig = _parse(argv, TRAIN, check)
    return config


def parse_evaluation_config(argv: Sequence[str]) -> EvaluationConfig:
    """Return the settings of `poweropd eval`; as parse_train_config, with its own checks."""
    config: EvaluationConfig = _parse(argv, EVALUATION, check_evaluation)
    return config


def _parse(argv: Sequence[str], schema: Schema, check: Callable[[Any, int | None], None]) -> Any:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--print_config", action="store_true")
    first.add_argument("-h", "--help", action="store_true")
    try:
        options, overrides = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if options.help:
        print(parser_of(schema).format_help(), end="")
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for path in options.config:
        layer = read_toml(Path(path), schema)
        values = settled(values | layer, values, layer)
    overridden = override(values, overrides, schema)
    values = settled(overridden, values, {name for name, _ in given(overrides)})
    config = _build(schema, schema.root, values)
    if isinstance(config, TrainConfig):
        refuse_unused(of_objective(values), dataclasses.asdict(config.objective))
    check(config, world_size())
    if options.print_config:
        print(to_toml(config), end="")
        raise SystemExit(0)
    return config


def to_toml(config: TrainConfig | EvaluationConfig) -> str:
    """Return as TOML every setting with an effect that isn't None; it reads as the same again."""
    tables = dataclasses.asdict(config)
    if isinstance(config, TrainConfig):
        for name in unused_settings(tables["objective"]):
            del tables["objective"][name]
    return tomli_w.dumps(_without_none(tables))


def read_toml(path: Path, schema: Schema = TRAIN) -> dict[str, Any]:
    """Return the settings of a TOML file by dotted name, of exactly the types of the schema.

    Raises: ConfigError if the file can't be read, isn't TOML, or holds an unknown name or a value
    of another type (an int is taken for a float; nothing else is converted).
    """
    return flat_settings(parse_toml(path), place=str(path), schema=schema)


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


def flat_settings(
    table: Mapping[str, Any], *, place: str, schema: Schema = TRAIN
) -> dict[str, Any]:
    """Return the settings of a table in the shape of the schema by dotted name, types checked.

    Raises: ConfigError, after the place that the table is from, as read_toml does.
    """
    values = dict(_flatten(table, schema))
    for name, value in values.items():
        if name not in schema.settings:
            raise ConfigError(f"{place}: {schema.not_a_setting(name)}")
        if not conforms(value, schema.settings[name].type):
            raise ConfigError(f"{place}: {wrong_type(schema.settings[name], repr(value))}")
    return values


def train_config(values: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run from values of the right types by dotted name; unchecked."""
    config: TrainConfig = _build(TRAIN, TrainConfig, values)
    return config


def _flatten(
    table: Mapping[str, Any], schema: Schema, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = prefix + key
        if name in schema.settings or not isinstance(value, dict):
            yield name, value
        elif value:
            yield from _flatten(value, schema, name + ".")
        elif name not in schema.tables:
            yield name, value


def override(
    values: Mapping[str, Any], argv: Sequence[str], schema: Schema = TRAIN
) -> dict[str, Any]:
    """Return every setting by dotted name: a command line's, else that of values, else its default.

    Raises: ConfigError for a malformed command line, and for a required setting that neither has.
    """
    argv, entries = without_entries(argv)
    for name, _ in given(argv):
        if name not in schema.settings:
            raise ConfigError(schema.not_a_setting(name))
    namespace = jsonargparse.Namespace()  # type: ignore[no-untyped-call]
    for name, value in values.items():
        namespace[name] = value
    try:
        # Given as defaults instead, a "5" of the files would come back as 5.
        parsed = parser_of(schema).parse_args(list(argv), namespace=namespace, defaults=False)
    except jsonargparse.ArgumentError as error:
        raise ConfigError(explain(str(error), argv, schema)) from error
    settings = {name: parsed[name] for name in schema.settings if name in parsed}
    for table, key, value in entries:
        if table not in schema.settings:
            raise ConfigError(schema.not_a_setting(f"{table}.{key}"))
        changed = dict(settings.get(table, {}))
        changed.pop(key, None)
        settings[table] = changed if value is None else changed | {key: value}
    return settings


def _build(schema: Schema, cls: type, values: Mapping[str, Any], table: str = "") -> Any:
    fields: dict[str, Any] = {}
    for field, kind in get_type_hints(cls).items():
        name = f"{table}.{field}".lstrip(".")
        if name in schema.tables:
            fields[field] = _build(schema, kind, values, name)
        elif name in values:
            fields[field] = float(values[name]) if kind is float else values[name]
    return cls(**fields)


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }
