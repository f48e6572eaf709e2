"""`poweropd convert`: checkpoints between Hugging Face's format and Megatron's."""

import argparse
import os
from pathlib import Path
from typing import Any

from poweropd_megatron.conversion.shards import parse_size

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_MAX_WORKERS = 4


def add_parser(commands: Any) -> None:
    """Add the command to those of `poweropd`."""
    convert = commands.add_parser(
        "convert",
        help="convert checkpoints: Hugging Face <-> Megatron",
        description="Convert a checkpoint file by file, without a model or a GPU, in little "
        "memory. An output folder appears when it is complete; the same command goes on after "
        "an interruption.",
    )
    directions = convert.add_subparsers(metavar="DIRECTION", required=True)
    to_megatron = directions.add_parser(
        "to-megatron",
        help="a Hugging Face folder as a torch_dist checkpoint for any layout",
        description="Example: poweropd convert to-megatron --input Qwen3-4B --output "
        "Qwen3-4B-megatron",
    )
    _add(to_megatron, "--input", "HF_DIR", "Hugging Face folder")
    _add(to_megatron, "--output", "DIR", "folder to make: config.json, tokenizer, weights/")
    _add_common(to_megatron, "by default each tensor keeps its own")
    to_megatron.set_defaults(run=_to_megatron)

    to_hf = directions.add_parser(
        "to-hf",
        help="a torch_dist checkpoint, converted or of a training, as a Hugging Face folder",
        description="Example: poweropd convert to-hf --input runs/a/checkpoints/step_000200 "
        "--reference Qwen3-4B --output Qwen3-4B-distilled",
    )
    _add(to_hf, "--input", "DIR", "converted folder, training checkpoint, or Megatron-LM's --save")
    _add(to_hf, "--output", "HF_DIR", "folder to make")
    to_hf.add_argument(
        "--reference",
        metavar="HF_DIR",
        type=Path,
        help="folder with config.json, tokenizer and, if the files are to be named as there, "
        "model.safetensors.index.json or weights (default: the input)",
    )
    to_hf.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_size,
        help="largest file, such as 5GB or 500MB (default: the reference's files, else 5GB)",
    )
    _add_common(
        to_hf,
        "by default each tensor keeps its own; fp32 takes the optimizer's copies of a bf16 "
        "training checkpoint",
    )
    to_hf.set_defaults(run=_to_hf)


def _add(parser: argparse.ArgumentParser, name: str, metavar: str, text: str) -> None:
    parser.add_argument(name, metavar=metavar, type=Path, required=True, help=text)


def _add_common(parser: argparse.ArgumentParser, dtype_text: str) -> None:
    parser.add_argument("--dtype", choices=list(_DTYPES), help=f"type to write; {dtype_text}")
    default = min(len(os.sched_getaffinity(0)), _MAX_WORKERS)
    parser.add_argument(
        "--workers",
        metavar="N",
        type=_count,
        default=default,
        help=f"processes (default: as many as cores, at most {_MAX_WORKERS}: here {default})",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes above 0")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _dtype(name: str | None) -> Any:
    import torch

    return name and getattr(torch, _DTYPES[name])


def _to_megatron(arguments: argparse.Namespace) -> int:
    from poweropd_megatron.conversion.to_megatron import to_megatron

    to_megatron(
        arguments.input,
        arguments.output,
        dtype=_dtype(arguments.dtype),
        num_workers=arguments.workers,
    )
    print(arguments.output)
    return 0


def _to_hf(arguments: argparse.Namespace) -> int:
    from poweropd_megatron.conversion.to_hugging_face import to_hugging_face

    to_hugging_face(
        arguments.input,
        arguments.output,
        reference=arguments.reference,
        dtype=_dtype(arguments.dtype),
        max_shard_bytes=arguments.max_shard_size,
        num_workers=arguments.workers,
    )
    print(arguments.output)
    return 0
