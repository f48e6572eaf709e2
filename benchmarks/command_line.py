"""The command line that the benchmarks share, and the file of figures."""

import argparse
import json
from pathlib import Path

import torch


def parse(
    description: str | None, *, quick: str, devices: tuple[str, ...] = ()
) -> argparse.Namespace:
    """Return quick, json and, where there are several devices, device.

    quick: what --quick does, and how long it takes.
    Raises: SystemExit for a file that can't be written, or a device that isn't there.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    if devices:
        parser.add_argument(
            "--device", choices=devices, default=devices[0], help=f"(default: {devices[0]})"
        )
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: {arguments.json.absolute().parent} is no folder")
    if devices and arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return arguments


def write(figures: dict[str, float], path: Path | None) -> None:
    """Write the figures where they were asked for."""
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")
