"""The command line of settings: their texts read by jsonargparse, --help, and messages."""

import argparse
import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, get_origin

import jsonargparse

from poweropd_megatron.config.settings import Schema, describe, wrong_type
from poweropd_megatron.errors import ConfigError

_DESCRIPTIONS = {
    "train": """\
Distil a teacher into a student. The command line wins over --config. Its values are written as in
TOML, but strings without quotes, and null for a setting that is to be left out.

  poweropd train --config launch/recipes/chain_sum.toml --optimizer.lr 1e-3
  poweropd train --config my.toml --data.train_files '["a.jsonl", "b.jsonl"]' --print_config
""",
    "eval": """\
Evaluate a model on prompts with answers, or go on with an evaluation. Values are given as for
poweropd train, whose student, data, eval and rollout settings have the same names here.

  poweropd eval --config my_eval.toml --student.path runs/chain_sum/export
  NPROC_PER_NODE=8 bash launch/eval.sh --config my_eval.toml --eval.num_samples 16
""",
}
"""The first text of --help, by command."""


_TABLES_OF_ENTRIES = ("student.megatron", "teacher.megatron")
"""Settings that are tables, whose entries the command line may also give one by one."""


def without_entries(
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


def given(argv: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line with their texts, None where one has none."""
    for argument, following in zip(argv, [*argv[1:], "-"], strict=False):
        if argument.startswith("--") and argument != "--":
            name, equals, text = argument.removeprefix("--").partition("=")
            absent = None if following.startswith("-") else following
            yield name.removesuffix("+"), text if equals else absent


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's types and defaults, with the line breaks of the description."""


def parser_of(schema: Schema) -> jsonargparse.ArgumentParser:
    """Return what reads a command line, and writes --help."""
    parser = jsonargparse.ArgumentParser(
        prog=f"poweropd {schema.command}",
        usage=f"poweropd {schema.command} --config FILE.toml [--SETTING VALUE ...]",
        description=_DESCRIPTIONS[schema.command],
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
    tables = {
        name: parser.add_argument_group(name or "run", text) for name, text in schema.tables.items()
    }
    for name, setting in schema.settings.items():
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


def explain(message: str, argv: Sequence[str], schema: Schema) -> str:
    """Return jsonargparse's message about a command line as one that names setting and value."""
    if missing := re.search(r"arguments are required: (.*)", message):
        example = missing[1].partition(",")[0]
        return f"no value for {missing[1]}: set it in a --config file, or with --{example} VALUE"
    if stray := re.search(r"unrecognized arguments: (.*)", message):
        return f"{stray[1]}: not understood; settings are given as --NAME VALUE or --NAME=VALUE"
    found = re.search(r'(?:argument --|Parser key ")([\w.]+)', message)
    if found is None:
        return message
    setting = schema.settings[found[1]]
    text = [text for name, text in given(argv) if name == setting.name][-1]
    if text is None:
        return (
            f"--{setting.name} needs a value: {describe(setting.type)} "
            f"(write --{setting.name}=VALUE if it starts with a minus)"
        )
    return wrong_type(setting, repr(text))
