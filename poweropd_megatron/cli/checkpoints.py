"""`poweropd inspect` and `poweropd verify`: what a folder is, and whether its weights are right."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poweropd_megatron.errors import EXIT_CODE_BAD_INPUT, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from poweropd_megatron.inspection.findings import Findings
    from poweropd_megatron.inspection.manifest import Entry
    from poweropd_megatron.inspection.tensors import NamedTensor

_NUM_DEFAULT_TOKENS = 64


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to those of `poweropd`."""
    inspect = commands.add_parser(
        "inspect",
        help="say what a folder of weights, a checkpoint or a run is, and whether it is complete",
        description="Say what a folder is (Hugging Face, Megatron, training checkpoint, a run's "
        "output_dir), and whether it is complete. Reads no weights. Exit code 2 if it is not. "
        "Example: poweropd inspect runs/chain_sum/checkpoints/step_000200",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser(
        "verify",
        help="check a folder's weights, and compare them with another's, bit for bit",
        description="Check a folder's names, shapes, types, files and values, and compare its "
        "weights with those of another folder, of either format, or with a manifest. Exit code 0 "
        "if all is well, 2 if not. Example: poweropd verify converted --against Qwen3-0.6B",
    )
    verify.add_argument(
        "--against",
        metavar="OTHER",
        type=Path,
        help="a folder, or a file of --write, whose tensors must be the same, bit for bit",
    )
    verify.add_argument(
        "--write", metavar="FILE", type=Path, help="write the SHA-256 of each tensor as JSON"
    )
    verify.add_argument(
        "--logits",
        action="store_true",
        help="compare the logits with those of transformers, in fp32, run in its own process on "
        "the same folder if it is a Hugging Face one, else on --reference or --against",
    )
    verify.add_argument(
        "--token-ids",
        metavar="IDS",
        type=_token_ids,
        action="append",
        help="with --logits: ids such as 1,2,3, a row each time it is given; by default one row of "
        f"{_NUM_DEFAULT_TOKENS} random ones",
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="with --logits: the largest difference that is well (%(default)s)",
    )
    verify.set_defaults(run=_verify)
    for parser in (inspect, verify):
        parser.add_argument("folder", metavar="FOLDER", type=Path, help="what to look at")
        parser.add_argument(
            "--reference",
            metavar="HF_FOLDER",
            type=Path,
            help="a folder whose config.json says the model, where a checkpoint doesn't",
        )


def _token_ids(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids such as 1,2,3")
    return [int(part) for part in parts]


def _inspect(arguments: argparse.Namespace) -> int:
    from poweropd_megatron.inspection import report
    from poweropd_megatron.inspection.folder import examine

    findings = examine(arguments.folder, reference=arguments.reference)
    if arguments.json:
        print(json.dumps(report.as_json(findings), indent=2))
    else:
        print("\n".join(report.describe(findings)))
    return EXIT_CODE_BAD_INPUT if findings.problems else 0


def _verify(arguments: argparse.Namespace) -> int:
    from poweropd_megatron.inspection import manifest, report, verify
    from poweropd_megatron.inspection.tensors import tensors_of

    _check_arguments(arguments)
    findings = _examined(arguments.folder, arguments.reference or arguments.against)
    print("\n".join(report.describe(findings)), flush=True)
    if findings.problems:
        return EXIT_CODE_BAD_INPUT
    digests = verify.digest(findings)
    problems = digests.problems
    print(
        report.line(
            "SHA-256", f"{manifest.digest_of(digests.entries)} of {len(digests.entries)} tensors"
        )
    )
    for note in digests.notes:
        print(report.line("note", note))
    if arguments.against is not None:
        entries, tensors = _other(arguments.against)
        differing = manifest.differences(digests.entries, entries)
        verdict = f"differs in {len(differing)}" if differing else "equal in all"
        print(report.line("against", f"{arguments.against}: {verdict} of {len(entries)} tensors"))
        problems += verify.explain(differing, tensors_of(findings), tensors)
    if arguments.write is not None:
        manifest.write(digests.entries, arguments.write)
        print(report.line("written", str(arguments.write)))
    if arguments.logits:
        problems += _compare_logits(findings, arguments)
    for line in report.wrong(problems):
        print(line)
    return EXIT_CODE_BAD_INPUT if problems else 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.write is not None and arguments.write.exists():
        raise InputError(f"--write: {arguments.write} exists already; name a file that doesn't")
    if arguments.token_ids and not arguments.logits:
        raise InputError(
            "--token-ids has no effect without --logits: give that too, or leave it out"
        )


def _examined(folder: Path, reference: Path | None) -> "Findings":
    from poweropd_megatron.inspection.folder import examine

    has_config = reference is not None and (reference / "config.json").is_file()
    findings = examine(folder, reference=reference if has_config else None)
    if findings.kind == "run":
        newest = findings.facts.get("newest")
        raise InputError(
            f"{folder} is a run's output_dir: name its export, or one of its checkpoints"
            + (f", such as {newest}" if newest else "")
        )
    return findings


def _other(path: Path) -> "tuple[dict[str, Entry], dict[str, NamedTensor] | None]":
    """Return the manifest of --against, and its tensors unless it is just a manifest."""
    from poweropd_megatron.inspection import manifest, verify
    from poweropd_megatron.inspection.tensors import tensors_of

    if not path.is_dir():
        return manifest.read(path), None
    findings = _examined(path, None)
    if findings.problems:
        raise InputError(f"--against: {path}: {findings.problems[0]}")
    return verify.digest(findings).entries, tensors_of(findings)


def _compare_logits(findings: "Findings", arguments: argparse.Namespace) -> list[str]:
    from poweropd_megatron.inspection import logits, report
    from poweropd_megatron.inspection.tensors import tensors_of

    assert findings.model is not None
    reference = _transformers_folder(findings, arguments)
    rows = _rows(findings.model.vocab_size, arguments.token_ids)
    theirs = logits.of_transformers(reference, rows)
    ours = logits.of_megatron(findings.model, tensors_of(findings), rows)
    found = logits.compare(ours, theirs)
    print(
        report.line(
            "logits",
            f"{found.num_tokens} tokens, fp32, against transformers on {reference}: max difference "
            f"{found.largest_difference:.2e} (std {found.std:.2f}), cosine "
            f"{found.smallest_cosine:.7f}, same argmax {found.num_same_argmax}",
        )
    )
    if found.largest_difference <= arguments.tolerance:
        return []
    return [f"logits differ by {found.largest_difference:.2e}, more than {arguments.tolerance:g}"]


def _transformers_folder(findings: "Findings", arguments: argparse.Namespace) -> Path:
    """Return the Hugging Face folder that transformers is to run."""
    places: list[Any] = [findings.path if findings.kind == "hugging-face" else None]
    places += [arguments.reference, arguments.against]
    for place in places:
        if place is not None and any(place.glob("*.safetensors")):
            folder: Path = place
            return folder
    raise InputError(
        "--logits: transformers needs a Hugging Face folder; name one with --reference"
    )


def _rows(vocab_size: int, given: list[list[int]] | None) -> "list[Tensor]":
    import torch

    if given is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocab_size, (_NUM_DEFAULT_TOKENS,), generator=generator)]
    largest = max(max(ids) for ids in given)
    if largest >= vocab_size:
        raise InputError(f"--token-ids: {largest} is beyond the vocabulary of {vocab_size}")
    return [torch.tensor(ids) for ids in given]
