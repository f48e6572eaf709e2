"""`poweropd eval`: one result for every layout and batch size, also after a kill; refusals."""

import json
import shutil
from pathlib import Path

import pytest
from support import converted_folder
from support.cli_run import Ended, ForkedRun, evaluate, metrics, records

STUDENT = "examples/chain_sum/student"
FILES = '["examples/chain_sum/eval.jsonl"]'


def settings(output_dir: Path, *changes: str) -> list[str]:
    """Return the arguments of an evaluation of 12 prompts with 4 answers each; later ones win."""
    return [
        *(f"--output_dir={output_dir}", f"--student.path={STUDENT}", "--student.dtype=fp32"),
        *(f"--data.eval_files={FILES}", "--data.max_prompt_length=16"),
        *("--eval.num_samples=3", "--eval.pass_at=[1, 2]", "--eval.max_prompts=12"),
        *("--eval.temperature=1.0", "--eval.max_new_tokens=40", "--save_interval=7"),
        *("--rollout.micro_batch_size=5", "--distributed_timeout_minutes=3"),
        *changes,
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Return the folder of an evaluation in one process, and what it said."""
    folder = tmp_path_factory.mktemp("evaluations") / "evaluated"
    return folder, evaluate(settings(folder)).expect(0)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_results_are_those_of_the_samples(evaluated: tuple[Path, Ended]) -> None:
    folder, ended = evaluated
    samples = records(folder / "samples.jsonl")
    assert len(samples) == 12 + 12 * 3
    greedy = [sample for sample in samples if sample["sample"] is None]
    sampled = [sample for sample in samples if sample["sample"] is not None]
    assert [s["prompt_number"] for s in greedy] == list(range(12))
    assert [(s["prompt_number"], s["sample"]) for s in sampled] == [
        (prompt, sample) for prompt in range(12) for sample in range(3)
    ]
    assert [s["seed"] for s in sampled] == [[1234, 1, 0, number] for number in range(36)]
    for sample in samples:
        assert sample["correct"] == (sample["response"].rpartition("#")[2] == sample["answer"])
        assert sample["extracted"] in (sample["response"].rpartition("#")[2], None)
        is_whole = sample["finish"] == "stop"
        assert sample["num_tokens"] == len(sample["response"]) + is_whole
    measures = results(folder)["files"]["eval"]["measures"]
    assert measures["greedy_accuracy"] == sum(s["correct"] for s in greedy) / 12
    counts = [sum(s["correct"] for s in sampled[3 * n : 3 * n + 3]) for n in range(12)]
    assert 0 < sum(counts) < 36
    assert measures["avg@3"] == pytest.approx(sum(counts) / 36)
    assert measures["pass@1"] == pytest.approx(measures["avg@3"])
    assert measures["pass@2"] == pytest.approx(sum([0, 2 / 3, 1, 1][n] for n in counts) / 12)
    assert measures["pass@3"] == pytest.approx(sum(n > 0 for n in counts) / 12)
    assert measures["response_length"] == sum(s["num_tokens"] for s in sampled) / 36
    cut = sum(s["finish"] == "length" for s in sampled) / 36
    assert measures["truncation_rate"] == pytest.approx(cut)
    assert f"results: {folder / 'results.json'}" in ended.stdout
    assert "pass@2" in ended.stdout


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, ["--save_interval=null", "--rollout.micro_batch_size=64"]),
        (2, ["--student.parallel.tensor_model_parallel_size=2", "--rollout.micro_batch_size=3"]),
        (2, ["--save_interval=11"]),
        (2, ["--student.parallel.pipeline_model_parallel_size=2", "--save_interval=30"]),
    ],
    ids=["other batches", "TP2", "DP2", "PP2"],
)
def test_every_layout_gives_the_same_samples_and_results(
    evaluated: tuple[Path, Ended], tmp_path: Path, world_size: int, changes: list[str]
) -> None:
    folder = tmp_path / "other"
    evaluate(settings(folder, *changes), world_size=world_size).expect(0)
    expected = evaluated[0] / "samples.jsonl"
    assert (folder / "samples.jsonl").read_text() == expected.read_text()
    assert results(folder)["files"] == results(evaluated[0])["files"]


def test_a_folder_converted_for_megatron_gives_the_same_samples(
    evaluated: tuple[Path, Ended], tmp_path: Path
) -> None:
    model = converted_folder.write(Path(STUDENT), tmp_path / "converted")
    folder = tmp_path / "other"
    tp2 = "--student.parallel.tensor_model_parallel_size=2"
    evaluate(settings(folder, f"--student.path={model}", tp2), world_size=2).expect(0)
    expected = evaluated[0] / "samples.jsonl"
    assert (folder / "samples.jsonl").read_text() == expected.read_text()


def test_a_killed_evaluation_goes_on_in_another_layout_to_the_same_samples(
    evaluated: tuple[Path, Ended], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    path = folder / "samples.jsonl"
    arguments = settings(folder, "--save_interval=2")
    with ForkedRun(arguments, command="eval") as run:
        run.wait_until(lambda: len(records(path)) >= 14)
        run.kill()
    done = len(records(path))
    assert done < 48
    with path.open("a") as file:
        file.write('{"source": "ev')
    ended = evaluate(settings(folder, "--save_interval=20"), world_size=2).expect(0)
    assert f"going on after {done}" in ended.stdout
    assert path.read_text() == (evaluated[0] / "samples.jsonl").read_text()
    assert results(folder)["files"] == results(evaluated[0])["files"]


def test_a_finished_evaluation_shows_its_results_again_and_other_k_of_its_samples(
    evaluated: tuple[Path, Ended], tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(evaluated[0], folder)
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    ended = evaluate(settings(folder)).expect(0)
    assert ended.stdout.split("responses to", 1)[1].count("more,") == 0
    table = evaluated[1].stdout[
        evaluated[1].stdout.index("\n\n") : evaluated[1].stdout.index("results:")
    ]
    assert table in ended.stdout
    after = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    changed = {name for name, content in after.items() if before.get(name) != content}
    assert changed == {"config.toml", "results.json"}  # which name output_dir
    evaluate(settings(folder, "--eval.pass_at=[]")).expect(0)
    assert "pass@2" not in results(folder)["mean"]


def test_another_model_or_other_settings_are_refused(
    evaluated: tuple[Path, Ended], tmp_path: Path
) -> None:
    folder, model = tmp_path / "mine", tmp_path / "model"
    shutil.copytree(evaluated[0], folder)
    shutil.copytree(STUDENT, model)
    moved = settings(folder, f"--student.path={model}")
    evaluate(moved).expect(0)
    card = model / "generation_config.json"
    card.write_text(card.read_text() + "\n")
    ended = evaluate(moved, world_size=2).expect(2)
    assert f"{folder} holds an evaluation of another model" in ended.stderr
    ended = evaluate(settings(folder, "--eval.temperature=0.5", "--seed=1")).expect(2)
    assert "other settings: seed: was 1234, is 1; eval.temperature: was 1.0, is 0.5" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("model", "step"), [(STUDENT, 0), ("export", 8)])
def test_it_gives_the_numbers_of_a_runs_own_evaluations(
    one, tmp_path: Path, model: str, step: int
) -> None:
    path = one.folder / "export" if model == "export" else model
    folder = tmp_path / "like a run"
    same = ["--eval.num_samples=2", "--eval.max_prompts=6", "--eval.max_new_tokens=64"]
    evaluate(settings(folder, *same, "--eval.pass_at=[]", f"--student.path={path}")).expect(0)
    expected = metrics(one.folder)[step]
    assert results(folder)["mean"] == {
        name: expected[f"eval/{name}"] for name in results(folder)["mean"]
    }
    assert len(results(folder)["mean"]) == 9
