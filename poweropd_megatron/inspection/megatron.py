"""A torch_dist checkpoint: whether files, tensors and model agree. Reads metadata, no weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poweropd_megatron.checkpoint.store import MANIFEST_NAME, read_manifest
from poweropd_megatron.conversion.dist_source import OPTIMIZER, DistSource, weights_folder
from poweropd_megatron.conversion.stated_model import recorded_model
from poweropd_megatron.errors import CheckpointError, InputError
from poweropd_megatron.inspection.findings import SETTING, Facts, Findings
from poweropd_megatron.inspection.hugging_face import check_dtype
from poweropd_megatron.models.families import read_model_config, stored_tensors
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.models.torch_dist_folder import TorchDistFolder
from poweropd_megatron.models.weight_source import OF_EACH_LAYER, WEIGHTS_NAME

_EMBEDDING = "embedding.word_embeddings.weight"


def examine(path: Path, *, reference: Path | None) -> Findings:
    """Return what a folder with a torch_dist checkpoint holds, with all that is wrong.

    reference: a folder whose config.json says the model, where the checkpoint itself doesn't.
    Cost: reads metadata and the common state, which are small beside the weights.
    """
    findings = Findings(path=path, weights_path=path / WEIGHTS_NAME, kind="megatron")
    try:
        findings.weights_path = weights_folder(path, setting=SETTING)
        _check_manifest(findings)
        folder = TorchDistFolder(findings.weights_path, setting=SETTING)
    except InputError as error:
        findings.add_error(error)
        return findings
    common = _common_state(findings, folder)
    findings.files = folder.files()
    for file in sorted(findings.weights_path.glob("*.distcp")):
        if file.name not in findings.files:
            findings.problems.append(f"{file} is a stray: .metadata has nothing in it")
    shapes = folder.shapes()
    of_optimizer = {key for key in shapes if OPTIMIZER.match(key)}
    objects = {key for key in folder.objects() if OPTIMIZER.match(key)}
    if of_optimizer or objects or "run" in common:
        findings.kind = "training"
    findings.tensors = {
        key: Facts(str(folder.dtype(key)).removeprefix("torch."), shape)
        for key, shape in shapes.items()
        if key not in of_optimizer
    }
    _tell_of_run(findings, folder, common)
    if of_optimizer or objects:
        num_bytes = sum(
            Facts(str(folder.dtype(key)), shapes[key]).num_bytes for key in of_optimizer
        )
        findings.facts["optimizer"] = f"{len(of_optimizer)} tensors, {num_bytes:,} bytes" + (
            f"; {len(objects)} objects" if objects else ""
        )
    findings.model = _model_of(findings, folder, common, reference)
    if findings.model is None:
        return findings
    converted = findings.weights_path.parent
    if findings.weights_path.name == WEIGHTS_NAME and (converted / "config.json").is_file():
        check_dtype(findings, converted)
    if any(OF_EACH_LAYER.match(key) for key in shapes):
        findings.notes.append("each layer is stored by itself: to-hf reads that, training doesn't")
        try:
            DistSource(folder, findings.model, prefers_masters=False)
        except InputError as error:
            findings.add_error(error)
    else:
        findings.compare_shapes(dict(_expected_shapes(findings)))
    return findings


def _expected_shapes(findings: Findings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the shape of each tensor by key; a vocabulary may be padded, as TP had it."""
    assert findings.model is not None
    for stored in stored_tensors(findings.model):
        shape = stored.shape
        found = findings.tensors.get(stored.key)
        if stored.weight.is_vocabulary and found and found.shape[0] > shape[0]:
            findings.notes.append(
                f"{stored.key} is padded from {shape[0]} to {found.shape[0]} rows"
            )
            shape = (found.shape[0], *shape[1:])
        yield stored.key, shape


def _check_manifest(findings: Findings) -> None:
    """Add a problem for each file that isn't as long as the manifest says."""
    folder = findings.weights_path
    if not (folder / MANIFEST_NAME).is_file():
        findings.notes.append(f"no {MANIFEST_NAME} with the files' SHA-256")
        return
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        findings.problems.append(str(error))
        return
    for name, stated in manifest.items():
        file = folder / name
        if not file.is_file():
            findings.problems.append(f"{file} is missing")
        elif file.stat().st_size != stated["bytes"]:
            findings.problems.append(
                f"{file} has {file.stat().st_size} bytes, {MANIFEST_NAME} says {stated['bytes']}"
            )


def _common_state(findings: Findings, folder: TorchDistFolder) -> dict[str, Any]:
    """Return what is stored beside tensors; nothing, with a note, where it isn't plain values.

    Megatron-LM keeps its arguments there, as objects of its own. Converting needs none of it.
    """
    try:
        return folder.common_state()
    except InputError:
        findings.notes.append("its common state holds more than plain values, and is not read")
        return {}


def _tell_of_run(findings: Findings, folder: TorchDistFolder, common: dict[str, Any]) -> None:
    """Fill in the step, and the layout: as it was recorded, or else what its pieces show."""
    if findings.weights_path.name == WEIGHTS_NAME:
        findings.facts["layout"] = "none: converted from files"
        return
    run = common.get("run", {})
    step = run.get("step", common.get("iteration"))
    if step is not None:
        findings.facts["step"] = str(step)
    if "world_size" in run:
        findings.facts["written by"] = f"{run['world_size']} ranks"
    if "parallel" in run:
        findings.facts["layout"] = ", ".join(
            f"{name.removesuffix('_size')} {value}"
            for name, value in run["parallel"].items()
            if value not in (1, None, False)
        )
    elif _EMBEDDING in findings.tensors:
        cuts = folder.cuts(_EMBEDDING, 0)
        findings.facts["layout"] = f"tensor_model_parallel {cuts} (from its pieces)"


def _model_of(
    findings: Findings, folder: TorchDistFolder, common: dict[str, Any], reference: Path | None
) -> ModelConfig | None:
    """Return the model's shape, by the checkpoint, a config.json beside it, or the reference."""
    try:
        recorded = recorded_model(folder, common)
    except InputError as error:
        findings.add_error(error)
        return None
    if recorded is not None:
        return recorded
    beside = [findings.path, findings.path.parent]
    places = [place for place in beside if (place / "config.json").is_file()]
    places += [reference] if reference else []
    if not places:
        findings.problems.append(
            "nothing says which model it is: no config.json in the folder or beside it; name a "
            "Hugging Face folder with --reference"
        )
        return None
    try:
        return read_model_config(places[0], setting=SETTING)
    except InputError as error:
        findings.add_error(error)
        return None
