"""Every setting of a command under its dotted name, with its type, default and help text."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import EnumType
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import docstring_parser

from poweropd_megatron.config.evaluation_schema import EvaluationConfig
from poweropd_megatron.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of the schema; default is dataclasses.MISSING where a run must give it."""

    name: str
    table: str
    type: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether a run must give it."""
        return self.default is dataclasses.MISSING


def conforms(value: Any, kind: Any) -> bool:
    """Return whether a value has exactly a field's type.

    A float may be an int, and is finite; an enumeration's member is given by its name.
    """
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(conforms(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(conforms(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(kind, EnumType):
        return isinstance(value, str) and value in kind.__members__
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def wrong_type(setting: Setting, given: str) -> str:
    """Return the message for a value, as the user wrote it, of another type."""
    return f"{setting.name} must be {describe(setting.type)}, not {given}"


def describe(kind: Any) -> str:
    """Return a field's type in the words of a message."""
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin is list:
        is_of_int = arguments == (int,)
        return (
            "a list of integers such as [1, 2]"
            if is_of_int
            else 'a list of strings such as ["a", "b"]'
        )
    if origin is dict:
        return "a table such as {name = true}"
    if isinstance(kind, EnumType):
        return "one of " + ", ".join(repr(name) for name in kind.__members__)
    plain = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
    return {**plain, NoneType: "null (in a file: left out)"}[kind]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a command can be told."""

    command: str
    root: type
    tables: Mapping[str, str]
    """The text of each table of settings by its dotted name; "" is the top."""
    settings: Mapping[str, Setting]
    """Every setting by its dotted name."""

    @classmethod
    def of(cls, root: type, *, command: str) -> Self:
        """Return the schema of a command from its dataclass."""
        classes = dict(_tables(root))
        return cls(
            command=command,
            root=root,
            tables={name: (table.__doc__ or "") for name, table in classes.items()},
            settings={
                setting.name: setting
                for name, table in classes.items()
                for setting in _settings(table, name)
            },
        )

    def not_a_setting(self, name: str) -> str:
        """Return the message for an unknown dotted name, with the nearest that exists."""
        if name in self.tables:
            example = next(s.name for s in self.settings.values() if s.table == name)
            return f"{name} is a table of settings: give them one by one, such as {example}"
        if self.command != "train" and name in SETTINGS:
            return f"{name} is a setting of poweropd train, and has no effect here: leave it out"
        leaf = name.rpartition(".")[2]
        nearest = [known for known in self.settings if known.rpartition(".")[2] == leaf]
        if "." in name or not nearest:
            candidates = nearest or [*self.settings, "config", "print_config", "help"]
            cutoff = 0.0 if nearest else 0.5
            nearest = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
        see = f"see poweropd {self.command} --help"
        hint = "did you mean " + " or ".join(nearest) + "?" if nearest else see
        return f"{name} is not a setting; {hint}"


def _tables(cls: type, name: str = "") -> Iterator[tuple[str, type]]:
    yield name, cls
    for field, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _tables(kind, f"{name}.{field}".lstrip("."))


def _settings(cls: type, table: str) -> Iterator[Setting]:
    types = get_type_hints(cls)
    texts = {
        p.arg_name: p.description or ""
        for base in reversed(cls.__mro__[:-1])
        for p in docstring_parser.parse_from_object(base).params
    }
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(types[field.name]):
            made = field.default_factory
            yield Setting(
                name=f"{table}.{field.name}".lstrip("."),
                table=table,
                type=types[field.name],
                default=field.default if made is dataclasses.MISSING else made(),
                help=texts[field.name],
            )


TRAIN = Schema.of(TrainConfig, command="train")
EVALUATION = Schema.of(EvaluationConfig, command="eval")

TABLES = TRAIN.tables
SETTINGS = TRAIN.settings
