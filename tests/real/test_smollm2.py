"""A real pretrained Llama through our loader and rollout engine, against transformers.

Skipped unless POWEROPD_REAL_CACHE names a folder that the model can be kept in (see packages.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from smollm2 import make_folder
from torch import Tensor

from poweropd_megatron.data.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXT = (
    "The mitochondrion is the powerhouse of the cell. In 1969, three people flew to the Moon, and "
    "two of them walked on it; 12 + 30 = 42, as everybody knows.\n\ndef add(a, b):\n    return a"
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
NUM_TOKENS = 24

# A process of its own, because the CPU device patches tensor methods in the one that runs Megatron.
REFERENCE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
asked = json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(asked["folder"], attn_implementation="eager")
assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
prompt = torch.tensor([asked["prompt"]])
with torch.no_grad():
    torch.save(model(torch.tensor([asked["text"]])).logits, asked["target"])
    row = model.generate(prompt, do_sample=False, max_new_tokens=asked["num_tokens"])[0]
print(json.dumps(row[prompt.shape[1]:].tolist()))
"""


@pytest.fixture(scope="module")
def folder() -> Path:
    return make_folder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(QUESTION))


@pytest.fixture(scope="module")
def reference(
    folder: Path,
    tokenizer: Tokenizer,
    prompt: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tensor, list[int]]:
    """Return transformers' logits of the text, [1, T, V], and its greedy answer."""
    target = tmp_path_factory.mktemp("reference") / "logits.pt"
    asked = {
        "folder": str(folder),
        "target": str(target),
        "text": tokenizer.encode(TEXT),
        "prompt": prompt,
        "num_tokens": NUM_TOKENS,
    }
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps(asked),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(target), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[tuple]:
    """Yield the layout of one rank, and the model on it."""
    from support.one_rank import joined

    from poweropd_megatron.models.build import build_model
    from poweropd_megatron.models.families import read_model_config

    with joined() as layout:
        config = read_model_config(folder, setting="student.path")
        [chunk] = build_model(
            config, layout, folder=str(folder), dtype="fp32", setting="student.path"
        )
        yield layout, chunk.eval()


def test_the_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2.5
    assert len(tokenizer.encode("1969")) == 4


def test_logits_are_those_of_transformers(
    tokenizer: Tokenizer, reference: tuple[Tensor, list[int]], model: tuple
) -> None:
    _, chunk = model
    ids = torch.tensor([tokenizer.encode(TEXT)])
    with torch.no_grad():
        ours = chunk(input_ids=ids, position_ids=None, attention_mask=None)
    theirs, _ = reference
    scale = theirs.std().item()
    worst = (ours - theirs).abs().max().item()
    print(f"largest difference {worst:.2e} of logits with a standard deviation of {scale:.2f}")
    assert worst <= 5e-5 * scale
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    surprise = torch.nn.functional.cross_entropy(ours[0, :-1], ids[0, 1:]).item()
    print(f"{surprise:.2f} nats a token")
    assert surprise < 3.5, "a model that has learnt English"


def test_the_greedy_answer_is_that_of_transformers_and_true(
    tokenizer: Tokenizer, prompt: list[int], reference: tuple[Tensor, list[int]], model: tuple
) -> None:
    from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
    from poweropd_megatron.rollout.sampling import Sampling

    layout, chunk = model
    engine = MegatronRolloutEngine(
        [chunk],
        layout,
        vocab_size=tokenizer.vocab_size,
        stop_token_ids=tokenizer.eos_token_ids,
        micro_batch_size=1,
        seed=1,
        logits_dtype=torch.float32,
        cuda_graph=False,
    )
    sampling = Sampling(max_new_tokens=NUM_TOKENS, temperature=0.0)
    trajectories = engine.generate([prompt], sampling, stream=(0, 1), weight_version=0)
    answer = trajectories.response_ids(0)
    _, theirs = reference
    print(repr(tokenizer.decode(answer)))
    assert answer == theirs
    assert "Paris" in tokenizer.decode(answer)
