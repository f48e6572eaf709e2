"""What a folder is, by the files in it, and what it holds."""

import json
from pathlib import Path

from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.conversion.dist_source import TRACKER_NAME
from poweropd_megatron.errors import InputError
from poweropd_megatron.inspection import hugging_face, megatron
from poweropd_megatron.inspection.findings import Findings
from poweropd_megatron.models.torch_dist_folder import METADATA_NAME
from poweropd_megatron.models.weight_source import is_converted


def examine(path: Path, *, reference: Path | None = None) -> Findings:
    """Return what a folder is and holds, with all that is wrong with it.

    reference: a folder whose config.json says the model, where a checkpoint doesn't.
    Raises: InputError if it is no folder of a kind that is known.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder")
    if (path / METADATA_NAME).is_file() or is_converted(path) or (path / TRACKER_NAME).is_file():
        findings = megatron.examine(path, reference=reference)
    elif (path / "checkpoints").is_dir() or (path / "config.toml").is_file():
        findings = _examine_run(path)
    elif (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        findings = hugging_face.examine(path)
    else:
        raise InputError(f"{path} {_unknown(path)}")
    if path.name.endswith(".partial"):
        findings.problems.insert(0, "it is the unfinished folder of a save or a conversion")
    return findings


def _examine_run(path: Path) -> Findings:
    """Return what is in a run's output_dir; it is complete if the run has ended with an export."""
    findings = Findings(path=path, weights_path=path, kind="run")
    store = CheckpointStore(path / "checkpoints")
    steps = store.steps()
    findings.facts["checkpoints"] = ", ".join(map(str, steps)) or "none"
    if steps:
        findings.facts["newest"] = str(store.path(steps[-1]))
    unfinished = [folder.name for folder in store.root.glob(".*.partial")]
    if unfinished:
        findings.notes.append(f"an unfinished save is left: {', '.join(unfinished)}")
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        findings.facts["steps"] = str(summary["steps"])
    except FileNotFoundError:
        findings.problems.append("the run has not ended: no summary.json")
    except (OSError, ValueError, TypeError, KeyError) as error:
        findings.problems.append(f"{path / 'summary.json'} can't be read: {error}")
    if (path / "export").is_dir():
        findings.facts["export"] = str(path / "export")
    else:
        findings.problems.append("nothing was exported")
    return findings


def _unknown(path: Path) -> str:
    if any(path.glob("mp_rank_*")):
        return (
            "holds Megatron's legacy format (mp_rank_*), which is not supported; save it as "
            "torch_dist with Megatron-LM first"
        )
    if any(path.glob("*.bin")):
        return "holds *.bin weights, which are not supported; save them as safetensors first"
    return (
        "is neither a Hugging Face folder (config.json, *.safetensors), nor a torch_dist "
        f"checkpoint ({METADATA_NAME}), nor a run's output_dir"
    )
