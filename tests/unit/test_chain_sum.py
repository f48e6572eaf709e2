"""The bundled task and the two checkpoints in examples/chain_sum."""

import json
import re
import subprocess
import sys
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from poweropd_megatron.data.chain_sum import (
    CHARACTERS,
    Problem,
    distinct_problems,
    sample_problems,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_sum"


def read_lines(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text().splitlines()]


def test_solution_of_a_known_problem() -> None:
    problem = Problem((5, 9, 0))
    assert problem.prompt == "5+9+0="
    assert problem.solution == "5+9=14;14+0=14#14"
    assert problem.answer == "14"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_step_of_a_solution_is_true_and_continues_the_last(split: str) -> None:
    for problem in islice(sample_problems(seed=3, split=split), 500):
        operands = [int(text) for text in problem.prompt.removesuffix("=").split("+")]
        steps, answer = problem.solution.split("#")
        total = operands[0]
        for step, operand in zip(steps.split(";"), operands[1:], strict=True):
            left, right, result = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())
            assert (left, right, result) == (total, operand, total + operand)
            total = result
        assert answer == problem.answer == str(eval(problem.prompt.removesuffix("=")))
        assert set(problem.prompt + problem.solution) <= set(CHARACTERS)
        assert 3 <= len(operands) <= 6


def test_problems_depend_on_the_seed_alone() -> None:
    first = list(islice(sample_problems(seed=1, split="train"), 50))
    assert first == list(islice(sample_problems(seed=1, split="train"), 50))
    assert first != list(islice(sample_problems(seed=2, split="train"), 50))


def test_distinct_problems_are_distinct_and_of_their_split() -> None:
    problems = distinct_problems(700, seed=5, split="eval")
    assert len(set(problems)) == len(problems) == 700
    assert {zlib.crc32(problem.prompt.encode()) % 8 for problem in problems} == {0}


def test_prompt_files_are_disjoint_and_answered() -> None:
    train, held_out = read_lines("train.jsonl"), read_lines("eval.jsonl")
    assert (len(train), len(held_out)) == (4096, 512)
    for row in train + held_out:
        assert row["answer"] == str(sum(map(int, row["prompt"].removesuffix("=").split("+"))))
    assert {zlib.crc32(row["prompt"].encode()) % 8 for row in held_out} == {0}
    assert 0 not in {zlib.crc32(row["prompt"].encode()) % 8 for row in train}
    assert len({row["prompt"] for row in train + held_out}) == 4096 + 512


def test_prompt_files_come_from_the_documented_seed() -> None:
    for name, split, count in (("train.jsonl", "train", 4096), ("eval.jsonl", "eval", 512)):
        problems = distinct_problems(count, seed=1234, split=split)
        assert [row["prompt"] for row in read_lines(name)] == [p.prompt for p in problems]


def test_example_folder_stays_below_two_megabytes() -> None:
    files = [f for f in EXAMPLE.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(file.stat().st_size for file in files) < 2_000_000


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_checkpoint_has_exactly_the_weights_of_its_config(name: str) -> None:
    config = json.loads((EXAMPLE / name / "config.json").read_text())
    weights = load_file(EXAMPLE / name / "model.safetensors")
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * dim
    keys = config["num_key_value_heads"] * dim
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    } | {
        f"model.layers.{index}.{key}.weight": shape
        for index in range(config["num_hidden_layers"])
        for key, shape in layer.items()
    }
    assert {key: tuple(weight.shape) for key, weight in weights.items()} == expected
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_dimensions_suit_four_way_parallelism_and_an_own_head_dim() -> None:
    config = json.loads((EXAMPLE / "student" / "config.json").read_text())
    assert config == json.loads((EXAMPLE / "teacher" / "config.json").read_text())
    assert config["vocab_size"] == 24
    for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"):
        assert config[name] % 4 == 0
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("teacher", 511), ("student", 213)])
def test_checkpoint_answers_as_well_as_documented(name: str, expected: int) -> None:
    """One prompt in a hundred may tip over on another machine's arithmetic."""
    pytest.importorskip("transformers")
    output = run_python("-c", COUNT_CORRECT, str(EXAMPLE), name)
    assert abs(int(output.split()[-1]) - expected) <= 5


@pytest.mark.slow
def test_script_writes_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        script = str(EXAMPLE / "make_checkpoints.py")
        run_python(script, "--output", str(folder), "--teacher_steps", "3")
    files = [file.relative_to(first) for file in first.rglob("*.*")]
    assert len(files) == 14
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes()


COUNT_CORRECT = """
import sys
from pathlib import Path
example, name = sys.argv[1:]
sys.path.insert(0, example)
import make_checkpoints as script
model = script.Qwen3ForCausalLM.from_pretrained(Path(example) / name)
problems = script.distinct_problems(script.NUM_EVAL_PROMPTS, seed=1234, split="eval")
accuracy = script.greedy_accuracy(model, script.build_tokenizer(), problems)
print(round(accuracy * len(problems)))
"""


def run_python(*args: str) -> str:
    """Run in a process of its own: transformers must not see what other tests do to torch."""
    command = [sys.executable, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=250).stdout
