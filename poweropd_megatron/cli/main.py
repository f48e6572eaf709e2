"""The `poweropd` command: train, eval, compare, report, convert, inspect, verify.

A command without settings adds its parser to _parser, with the function that runs it as `run`; that
returns the exit code. Nothing heavy is imported before it is needed, so that --help and a wrong
setting answer at once.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from poweropd_megatron import __version__, interruption
from poweropd_megatron.cli import checkpoints, convert
from poweropd_megatron.environment import check_rank_variables, speaks_for_node, world_size
from poweropd_megatron.errors import EXIT_CODE_BAD_INPUT, UserError

_DESCRIPTION = """\
On-policy distillation with the bounded power reward, on Megatron-Core.

  poweropd train --config my.toml --optimizer.lr 1e-6                           (one process)
  bash launch/pretrain_opd.sh --config launch/recipes/qwen3_1p7b_from_4b.toml   (all GPUs)
  poweropd eval --config my_eval.toml --student.path runs/chain_sum/export
  poweropd report runs/chain_sum
  poweropd compare --config launch/recipes/chain_sum_compare.toml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of a command: 0, its own, or 2 after an error that the user can mend.

    Such an error is one message on stderr, from rank 0 alone in a job of many ranks; any other
    exception passes through. train.run.run_training therefore raises a UserError on every rank.
    After Ctrl-C it is 130, after SIGTERM 143, with one message too.

    Raises: SystemExit from --help, --version, --print_config and a malformed command line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interruption.raising():
            if arguments[:1] == ["train"]:
                return _train(arguments[1:])
            if arguments[:1] == ["eval"]:
                return _evaluate(arguments[1:])
            if arguments[:1] == ["compare"]:
                return _compare(arguments[1:])
            parsed = _parser().parse_args(arguments)
            code: int = parsed.run(parsed)
            return code
    except UserError as error:
        if speaks_for_node():
            print(f"poweropd: error: {error}", file=sys.stderr)
        return EXIT_CODE_BAD_INPUT
    except interruption.Interrupted as signal:
        if speaks_for_node() and not signal.is_told:
            print(f"poweropd: interrupted by {signal}; run the same command again", file=sys.stderr)
        return signal.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="poweropd",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"poweropd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("train", help="train, or go on with a run (poweropd train --help)")
    commands.add_parser("eval", help="evaluate a model on prompt files (poweropd eval --help)")
    commands.add_parser(
        "compare", help="train with several methods and seeds, and tell (poweropd compare --help)"
    )
    report = commands.add_parser(
        "report",
        help="write the report of a run, or of several over one another, as one HTML file",
        description="Write the report of a run, finished or not, as one HTML file, and print its "
        "path; of several runs, a page with their curves over one another. Examples: poweropd "
        "report runs/chain_sum; poweropd report runs/a runs/b --output comparison.html",
    )
    report.add_argument(
        "run_dirs", metavar="RUN", type=Path, nargs="+", help="the output_dir of a run"
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="where to write; by default RUN/report.html, or comparison.html here for several",
    )
    report.set_defaults(run=_report)
    convert.add_parser(commands)
    checkpoints.add_parsers(commands)
    return parser


def _train(argv: Sequence[str]) -> int:
    from poweropd_megatron.config.load import parse_train_config
    from poweropd_megatron.config.rules import check

    config = _parsed_by_all(parse_train_config, argv)
    check(config, world_size=world_size() or 1)

    from poweropd_megatron.train.run import run_training

    run_training(config)
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    from poweropd_megatron.config.evaluation import check_evaluation
    from poweropd_megatron.config.load import parse_evaluation_config

    config = _parsed_by_all(parse_evaluation_config, argv)
    check_evaluation(config, world_size=world_size() or 1)

    from poweropd_megatron.evaluation.run import run_evaluation

    run_evaluation(config)
    return 0


def _parsed_by_all[T](parse: Callable[[Sequence[str]], T], argv: Sequence[str]) -> T:
    """Return what a command line says; one rank of a node prints what it asks for."""
    check_rank_variables()
    silent = contextlib.redirect_stdout(io.StringIO())
    with contextlib.nullcontext() if speaks_for_node() else silent:
        return parse(argv)


def _compare(argv: Sequence[str]) -> int:
    from poweropd_megatron.comparison.recipe import parse_recipe

    recipe = parse_recipe(argv)

    from poweropd_megatron.comparison.command import compare

    return compare(recipe)


def _report(arguments: argparse.Namespace) -> int:
    if len(arguments.run_dirs) == 1:
        from poweropd_megatron.telemetry.report import write_report

        print(write_report(arguments.run_dirs[0], arguments.output))
    else:
        from poweropd_megatron.telemetry.comparison import write_comparison

        print(write_comparison(arguments.run_dirs, arguments.output or Path("comparison.html")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
