"""The export of a run, in the hands of `transformers`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cli_run import REPO, fork, join, records, rewound, settings, train
from torch import Tensor

from poweropd_megatron.cli.main import main
from poweropd_megatron.conversion.to_megatron import to_megatron

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STUDENT = REPO / "examples" / "chain_sum" / "student"
CHECKPOINT = "TP 2 x PP 2, checkpoint"

# A process of its own, because the CPU device patches tensor methods in the one that runs Megatron.
ANSWER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
answers = {}
for folder, prompts in json.load(sys.stdin).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers[folder] = {"dtype": str(model.dtype), "type": type(model).__name__, "responses": []}
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        row = model.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1]:]
        text = tokenizer.decode(row, skip_special_tokens=True)
        answers[folder]["responses"].append(text)
print(json.dumps(answers))
"""


def last_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the greedy samples of a run's last evaluation."""
    samples = records(folder / "samples.jsonl")
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder, through its index where it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    files = json.loads(index.read_text())["weight_map"]
    loaded = {name: load_file(folder / name) for name in set(files.values())}
    assert {name for tensors in loaded.values() for name in tensors} == set(files)
    return {name: loaded[file][name] for name, file in files.items()}


@pytest.fixture(scope="module")
def exports(runs, tp2, one, bf16) -> dict[str, Path]:
    """Return the Hugging Face folder of a run, in its output_dir, by the run's layout or type."""
    pp2 = rewound(one.folder, 8, runs / "exported_pp2")
    train(settings(pp2, pp=2), world_size=2).expect(0)
    return {
        "TP 2": tp2.folder / "export",
        "PP 2": pp2 / "export",
        "bf16": bf16.folder / "export",
        CHECKPOINT: _converted_checkpoint(one.folder, runs / "tp2_pp2"),
    }


def _converted_checkpoint(before: Path, folder: Path) -> Path:
    """Return what the command makes of a checkpoint that two by two ranks saved."""
    rewound(before, 4, folder)
    train(settings(folder, tp=2, pp=2), world_size=4).expect(0)
    checkpoint, converted = folder / "checkpoints" / "step_000008", folder / "converted"
    arguments = ["--input", checkpoint, "--reference", STUDENT, "--output", converted]
    assert main(["convert", "to-hf", *map(str, arguments), "--workers=1"]) == 0
    return converted


@pytest.fixture(scope="module")
def answers(exports: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """Return a function from the name of an export to what transformers makes of it."""
    questions = {
        str(folder): [sample["prompt"] for sample in last_samples(folder.parent)]
        for folder in exports.values()
    }
    done = subprocess.run(
        [sys.executable, "-c", ANSWER],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answered = json.loads(done.stdout.splitlines()[-1])
    return lambda name: answered[str(exports[name])]


@pytest.mark.parametrize("name", ["TP 2", "PP 2", CHECKPOINT])
def test_transformers_gives_the_same_greedy_answers_as_the_last_evaluation(name, exports, answers):
    samples = last_samples(exports[name].parent)
    assert len({sample["response"] for sample in samples}) == 4
    assert answers(name) == {
        "dtype": "torch.float32",
        "type": "Qwen3ForCausalLM",
        "responses": [sample["response"] for sample in samples],
    }


@pytest.mark.parametrize("name", ["TP 2", "PP 2"])
def test_the_exported_tensors_have_the_names_shapes_and_types_of_the_first_ones(name, exports):
    first, exported = tensors_of(STUDENT), tensors_of(exports[name])
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in exported.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in first.items()
    }
    assert all(not torch.equal(exported[key], first[key]) for key in first)


@pytest.mark.parametrize(("name", "num_files"), [("TP 2", 1), ("PP 2", 2), ("bf16", 1)])
def test_an_export_has_the_files_of_the_first_folder_with_new_weights(name, num_files, exports):
    export = exports[name]
    weights = {"model.safetensors"}
    if num_files > 1:
        weights = {f"model-{n + 1:05d}-of-{num_files:05d}.safetensors" for n in range(num_files)}
        weights.add("model.safetensors.index.json")
    others = {file.name for file in STUDENT.iterdir()} - {"model.safetensors"}
    assert {file.name for file in export.iterdir()} == others | weights
    for file in others - {"config.json"}:
        assert (export / file).read_bytes() == (STUDENT / file).read_bytes()
    assert len({file.stat().st_mode for file in export.iterdir()}) == 1


def test_the_index_of_several_files_has_their_size(exports):
    export = exports["PP 2"]
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(export).values())


def test_config_json_is_the_first_one_where_the_type_is_too(exports):
    config = STUDENT / "config.json"
    assert (exports["TP 2"] / "config.json").read_bytes() == config.read_bytes()


def test_a_bf16_run_exports_bf16_and_says_so(exports, answers):
    export = exports["bf16"]
    tensors = tensors_of(export)
    assert tensors.keys() == tensors_of(STUDENT).keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    before = json.loads((STUDENT / "config.json").read_text())
    after = json.loads((export / "config.json").read_text())
    assert after == before | {"torch_dtype": "bfloat16"}
    assert answers("bf16")["dtype"] == "torch.bfloat16"
    assert [len(text) > 4 for text in answers("bf16")["responses"]] == [True] * 4


def test_a_run_from_converted_folders_exports_what_one_from_the_first_folders_does(
    exports, tmp_path
):
    """Bit by bit, with the same files, and none of the converted weights."""
    paths = []
    for model in ("student", "teacher"):
        to_megatron(STUDENT.parent / model, tmp_path / model)
        paths.append(f"--{model}.path={tmp_path / model}")
    train(settings(tmp_path / "run", *paths, tp=2), world_size=2).expect(0)
    first, converted = exports["TP 2"], tmp_path / "run" / "export"
    assert {f.name: f.read_bytes() for f in converted.iterdir()} == {
        f.name: f.read_bytes() for f in first.iterdir()
    }


def test_a_checkpoint_is_told_apart_from_its_run_and_holds_what_the_run_exported(exports, capsys):
    run = exports[CHECKPOINT].parent
    checkpoint = run / "checkpoints" / "step_000008"
    capsys.readouterr()
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["facts"]["step"]) == ("training", "8")
    assert found["facts"]["layout"] == "tensor_model_parallel 2, pipeline_model_parallel 2"
    assert found["facts"]["written by"] == "4 ranks"
    assert found["num_parameters"] == sum(t.numel() for t in tensors_of(run / "export").values())
    for other in (run / "export", exports[CHECKPOINT]):
        assert main(["verify", str(checkpoint), "--against", str(other)]) == 0
    assert main(["verify", str(run)]) == 2
    assert f"name its export, or one of its checkpoints, such as {checkpoint}" in str(
        capsys.readouterr().err
    )
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "run"
    assert found["facts"]["checkpoints"] == "4, 8"


def test_a_changed_file_of_a_checkpoint_is_found(exports, tmp_path, capsys):
    checkpoint = exports[CHECKPOINT].parent / "checkpoints" / "step_000008"
    shutil.copytree(checkpoint, tmp_path / "step_000008")
    file = max((tmp_path / "step_000008").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(tmp_path / "step_000008")]) == 0
    assert main(["verify", str(tmp_path / "step_000008")]) == 2
    assert f"{file} is corrupt: its SHA-256 is not the manifest's" in capsys.readouterr().out


def verify(arguments: list[str]) -> None:
    sys.exit(main(["verify", *arguments]))


def test_the_logits_of_a_checkpoint_are_those_of_transformers_on_its_export(exports, tmp_path):
    """In a forked process, because Megatron's parallel state is one for each process."""
    converted = exports[CHECKPOINT]
    checkpoint = converted.parent / "checkpoints" / "step_000008"
    rows = ["--token-ids=1,2,3,4,5,6,7", "--token-ids=8,9"]
    arguments = [str(checkpoint), "--reference", str(converted), "--logits", *rows]
    arguments.append("--tolerance=2e-5")
    codes = join(fork(verify, arguments, world_size=1, logs=tmp_path))
    output = (tmp_path / "0.out").read_text() + (tmp_path / "0.err").read_text()
    assert codes == [0], output
    assert "logits      9 tokens, fp32, against transformers on" in output
    assert "same argmax 9" in output
