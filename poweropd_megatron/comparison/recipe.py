"""The settings of a comparison: those of every run, and for each method those that differ."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from poweropd_megatron.config.load import flat_settings, override, parse_toml
from poweropd_megatron.errors import ConfigError

MAY_DIFFER = ("objective.*",)
"""Settings that a method may have for itself: what it is rewarded for, and nothing else."""

GIVEN_BY_PLAN = {"output_dir": "output_dir", "seed": "seeds"}
"""Settings that differ from run to run -> the recipe's setting that they come from."""

_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DESCRIPTION = """\
Train with every method of a recipe and every seed, runs side by side, and write a table, figures
and a page about them. Running it again goes on: finished runs are kept, others resume.

  poweropd compare --config launch/recipes/chain_sum_compare.toml
  poweropd compare --config launch/recipes/chain_sum_compare.toml --quick
  poweropd compare --config my.toml --jobs 8 --train.optimizer.lr 1e-3

--train.SETTING VALUE changes a setting of every run; poweropd train --help explains them.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A comparison, checked but for what the settings of its runs must be together."""

    output_dir: Path
    """Folder of everything that the comparison writes."""
    seeds: list[int]
    """Each method is trained once with each."""
    jobs: int
    """Runs side by side."""
    ranks: int
    """Processes of each run."""
    threads: int
    """Threads of each process on a CPU."""
    thresholds: list[float]
    """Greedy accuracies; the table says after how many steps each is reached."""
    train: dict[str, Any]
    """Settings of every run, all but those of GIVEN_BY_PLAN, by dotted name."""
    methods: dict[str, dict[str, Any]]
    """The settings that each method has for itself, by dotted name."""
    report_only: bool
    """Start no run; write the table and figures of the runs that are finished."""


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """Return the comparison that a command line asks for.

    Raises: ConfigError naming the setting, its value and what would work. SystemExit after --help.
    """
    options, rest = _parser().parse_known_args(argv)
    path = Path(options.config)
    values = _read(path)
    quick = values.pop("quick")
    if options.quick:
        values = values | quick | {"train": values["train"] | quick.get("train", {})}
    given = {"output_dir": options.output_dir, "jobs": options.jobs}
    values |= _checked({k: v for k, v in given.items() if v is not None}, place="--")
    methods = _chosen(values["methods"], options.methods)
    overrides = _train_overrides(rest, values["methods"])
    # Of the settings that vary, any value does for reading the others.
    train = override(values["train"] | {"output_dir": values["output_dir"]}, overrides)
    return Recipe(
        output_dir=Path(values["output_dir"]),
        train={name: value for name, value in train.items() if name not in GIVEN_BY_PLAN},
        methods=methods,
        report_only=options.report_only,
        **{name: values[name] for name in ("seeds", "jobs", "ranks", "threads", "thresholds")},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="poweropd compare",
        usage="poweropd compare --config FILE.toml [options] [--train.SETTING VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="the recipe")
    parser.add_argument(
        "--quick", action="store_true", help="with the changes of the recipe's table `quick`"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="in place of the recipe's")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side")
    parser.add_argument(
        "--methods", metavar="NAME,...", help="only these of the recipe's methods; all by default"
    )
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="start no run; write table, figures and page of the runs that are finished",
    )
    return parser


def _read(path: Path) -> dict[str, Any]:
    """Return a recipe's values, with flat settings of runs, of the right types and ranges."""
    table = parse_toml(path)
    quick = table.pop("quick", {})
    if not isinstance(quick, dict):
        raise ConfigError(f"{path}: quick must be a table, not {quick!r}")
    values = _defaults() | _checked(table, place=f"{path}: ")
    for name in ("output_dir", "seeds", "train", "methods"):
        if name not in values:
            raise ConfigError(f"{path}: no value for {name}; a comparison needs one")
    for name in values["train"]:
        if all(name in settings for settings in values["methods"].values()):
            raise ConfigError(f"{path}: train.{name} has no effect: every method has its own")
    values["quick"] = _checked(quick, place=f"{path}: quick.")
    if "methods" in values["quick"]:
        raise ConfigError(f"{path}: quick.methods: methods can't differ with --quick")
    return values


def _defaults() -> dict[str, Any]:
    return {"jobs": 1, "ranks": 1, "threads": 1, "thresholds": []}


def _checked(table: Mapping[str, Any], *, place: str) -> dict[str, Any]:
    values = {}
    for name, value in table.items():
        where = place + name
        if name in ("jobs", "ranks", "threads"):
            if type(value) is not int or value < 1:
                raise ConfigError(f"{where} must be a whole number from 1, not {value!r}")
        elif name == "seeds":
            _check_list(where, value, "different whole numbers from 0", _is_seed, smallest=1)
        elif name == "thresholds":
            _check_list(where, value, "different accuracies from 0 to 1", _is_accuracy, smallest=0)
        elif name == "output_dir":
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where} must be the name of a folder, not {value!r}")
        elif name == "train":
            value = _train_settings(value, where)
        elif name == "methods":
            value = _method_settings(value, where)
        else:
            raise ConfigError(
                f"{where} is not a setting of a comparison; those of its runs go under [train]"
            )
        values[name] = value
    return values


def _check_list(where: str, value: Any, what: str, fits: Any, *, smallest: int) -> None:
    good = isinstance(value, list) and all(map(fits, value)) and len(set(value)) == len(value)
    if not good or len(value) < smallest:
        raise ConfigError(f"{where} must be a list of {what}, not {value!r}")


def _is_seed(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_accuracy(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _train_settings(table: Any, where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table of settings of a run, not {table!r}")
    settings = flat_settings(table, place=where)
    for name in GIVEN_BY_PLAN.keys() & settings.keys():
        raise ConfigError(f"{where}.{name} is given for each run by {GIVEN_BY_PLAN[name]}")
    return settings


def _method_settings(table: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{where} must be a table of methods, such as [methods.power_1]")
    methods = {}
    for method, settings in table.items():
        if not _METHOD_NAME.fullmatch(method):
            raise ConfigError(
                f"{where}: {method!r} names a folder: use letters, digits and . _ - only"
            )
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}.{method} must be a table of settings, not {settings!r}")
        methods[method] = flat_settings(settings, place=f"{where}.{method}")
        for name in methods[method]:
            if not any(fnmatchcase(name, pattern) for pattern in MAY_DIFFER):
                raise ConfigError(
                    f"{where}.{method}: {name} must be equal for all methods; only "
                    f"{', '.join(MAY_DIFFER)} may differ, so set it under [train]"
                )
    return methods


def _chosen(methods: Mapping[str, dict[str, Any]], names: str | None) -> dict[str, dict[str, Any]]:
    if names is None:
        return dict(methods)
    chosen = names.split(",")
    for name in chosen:
        if name not in methods:
            raise ConfigError(
                f"--methods: {name!r} is not a method of the recipe; it has {', '.join(methods)}"
            )
    return {name: settings for name, settings in methods.items() if name in chosen}


def _train_overrides(
    arguments: Sequence[str], methods: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return --train.NAME VALUE ... as the command line of a run."""
    overrides = []
    for argument in arguments:
        if not argument.startswith("--"):
            overrides.append(argument)
            continue
        if not argument.startswith("--train."):
            raise ConfigError(
                f"{argument} is not an option of poweropd compare (see --help); a setting of "
                "every run is given as --train.NAME VALUE"
            )
        option = argument.removeprefix("--train.")
        name = option.partition("=")[0]
        if name in GIVEN_BY_PLAN:
            raise ConfigError(f"--train.{name} is given for each run by {GIVEN_BY_PLAN[name]}")
        users = [method for method, settings in methods.items() if name in settings]
        if users:
            raise ConfigError(
                f"--train.{name}: {', '.join(users)} have their own; change it in the recipe"
            )
        overrides.append(f"--{option}")
    return overrides
