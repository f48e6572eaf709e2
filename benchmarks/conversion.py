"""Conversion against a copy: seconds and memory, Hugging Face <-> Megatron, with 2 workers.

    python benchmarks/conversion.py [--quick] [--json FILE]

The folders are made from a seed among this machine's temporary files (13 GB are needed). A time
ends when the output is on the disk (sync), for `cp -r` as for the conversions, and leaves out what
the interpreter needs to import torch, which the first line says. Before, the input is either
dropped from the page cache or read into it. The best of some rounds counts. Memory is the resident
peak of the largest process, with torch's own, which the first line says too.
"""

import shutil
import tempfile
import time
from pathlib import Path

from command_line import parse, write
from conversion_cases import (
    MODELS,
    QUICK,
    Taken,
    forget,
    make_folder,
    remember,
    run_command,
    run_python,
)

NUM_WORKERS = 2
VERBS = ("import", "export")


def main() -> None:
    """Measure, print a table, and write the figures where they are asked for."""
    arguments = parse(__doc__, quick="a small model once: seconds")
    models, rounds = (QUICK, 1) if arguments.quick else (MODELS, 3)
    begin = time.perf_counter()
    interpreter_bytes = run_python("to_hugging_face", "None").peak_bytes
    figures: dict[str, float] = {
        "interpreter_bytes": interpreter_bytes,
        "interpreter_seconds": time.perf_counter() - begin,
    }
    print(
        f"interpreter: {interpreter_bytes / 2**20:.0f} MiB, {figures['interpreter_seconds']:.1f} s"
    )
    print(f"{'':38}{'cp -r':>9}{'import':>9}{'export':>9}{'':5}{'of cp':>7}{'':8}{'memory':>14}")
    for name, config in models.items():
        with tempfile.TemporaryDirectory(prefix="conversion-") as place:
            figures |= measure(name, config, Path(place), rounds)
    for verb in VERBS:
        figures[f"{verb}_vs_cp"] = min(figures[f"{verb}_vs_cp_{name}"] for name in models)
        peaks = [figures[f"{verb}_peak_bytes_{name}"] for name in models]
        figures[f"{verb}_peak_bytes"] = max(peaks)
    write(figures, arguments.json)


def measure(name: str, config: dict[str, object], place: Path, rounds: int) -> dict[str, float]:
    """Return a model's times relative to cp, and memory; print its lines of the table."""
    source, megatron, out = place / "hf", place / "megatron", place / "out"
    num_bytes = make_folder(source, config)
    _import(source, megatron)
    figures: dict[str, float] = {}
    for suffix, set_cache in (("", forget), ("_cached", remember)):
        taken: dict[str, list[Taken]] = {"cp": [], "import": [], "export": []}
        for _ in range(rounds):
            set_cache(source)
            taken["cp"].append(run_command(["cp", "-r", str(source), str(out)]))
            shutil.rmtree(out)
            set_cache(source)
            taken["import"].append(_import(source, out))
            shutil.rmtree(out)
            set_cache(megatron)
            taken["export"].append(_export(megatron, out, source))
            shutil.rmtree(out)
        seconds = {verb: min(one.seconds for one in all_) for verb, all_ in taken.items()}
        peaks = {verb: max(one.peak_bytes for one in all_) for verb, all_ in taken.items()}
        for verb in VERBS:
            figures[f"{verb}_vs_cp{suffix}_{name}"] = seconds["cp"] / seconds[verb]
            figures[f"{verb}_peak_bytes{suffix}_{name}"] = peaks[verb]
        figures |= {f"{verb}_seconds{suffix}_{name}": value for verb, value in seconds.items()}
        label = "" if suffix else f"{name}, {num_bytes / 1e9:.2f} GB"
        print(
            f"{label:28}{'in cache' if suffix else 'on disk':10}"
            + "".join(f"{value:7.2f} s" for value in seconds.values())
            + "".join(f"{seconds['cp'] / seconds[verb]:7.2f}x" for verb in VERBS)
            + "".join(f"{peaks[verb] / 2**20:8.0f} MiB" for verb in VERBS),
            flush=True,
        )
    return figures


def _import(source: Path, output: Path) -> Taken:
    call = f"module.to_megatron(Path({str(source)!r}), Path({str(output)!r})"
    return run_python("to_megatron", f"{call}, num_workers={NUM_WORKERS})")


def _export(source: Path, output: Path, reference: Path) -> Taken:
    call = (
        f"module.to_hugging_face(Path({str(source)!r}), Path({str(output)!r}), "
        f"reference=Path({str(reference)!r}), num_workers={NUM_WORKERS})"
    )
    return run_python("to_hugging_face", call)


if __name__ == "__main__":
    main()
