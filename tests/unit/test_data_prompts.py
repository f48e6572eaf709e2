"""Prompt files with every mistake that they can have, and the stream's epochs and resumption."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.data.prompts import Prompt, PromptStream, load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import CheckpointError, InputError

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_sum"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}{{ mode }}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EXAMPLE / "student")


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Tokenizer:
    folder = tmp_path / "chat"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_bytes((EXAMPLE / "student" / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.from_folder(folder)


def write_lines(file: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def load(
    files: list[str], tokenizer: Tokenizer, *, need: bool = False, **data: Any
) -> list[Prompt]:
    config = DataConfig(train_files=files, **data)
    return load_prompts(files, tokenizer, config, setting="data.train_files", need_answers=need)


def test_prompts_come_in_file_order_with_ids_answers_and_sources(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    first = write_lines(tmp_path / "a.jsonl", {"prompt": "1+2=", "answer": "3"}, {"prompt": "3="})
    second = write_lines(tmp_path / "b.jsonl", {"prompt": "9=", "answer": -9, "id": [1]})
    assert load([first, second], tokenizer) == [
        Prompt(text="1+2=", token_ids=(4, 13, 5, 14), answer="3", source="a"),
        Prompt(text="3=", token_ids=(6, 14), answer=None, source="a"),
        Prompt(text="9=", token_ids=(12, 14), answer="-9", source="b"),
    ]


def test_example_files_load(tokenizer: Tokenizer) -> None:
    prompts = load([str(EXAMPLE / "eval.jsonl")], tokenizer, need=True, max_prompt_length=12)
    assert len(prompts) == 512
    assert all(tokenizer.decode(prompt.token_ids) == prompt.text for prompt in prompts)


def test_last_line_needs_no_newline(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "1="}\r\n{"prompt": "2="}')
    assert [prompt.text for prompt in load([str(file)], tokenizer)] == ["1=", "2="]


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "1\u2028\x85="}\n', encoding="utf-8")
    assert load([str(file)], tokenizer)[0].text == "1\u2028\x85="


def test_suffix_and_template_are_applied(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"},
        {"role": "tool", "content": "4"},
    ]
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "5="}, {"messages": messages})
    prompts = load(
        [file],
        chat_tokenizer,
        apply_chat_template=True,
        chat_template_kwargs={"mode": "#"},
        prompt_suffix=";",
    )
    assert [prompt.text for prompt in prompts] == [
        "[user:5=;]>#",
        "[user:1][assistant:2][user:3;][tool:4]>#",
    ]
    assert prompts[0].token_ids == tuple(chat_tokenizer.encode("[user:5=;]>#"))
    assert (
        load([write_lines(tmp_path / "b.jsonl", {"prompt": "5="})], chat_tokenizer)[0].text == "5="
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "is blank"),
        ("  ", "is blank"),
        ('{"prompt": "1="', "is not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"answer": "1"}, 'expected one of "prompt" and "messages", got neither'),
        ({"prompt": "1=", "messages": []}, 'expected one of "prompt" and "messages", got both'),
        ({"prompt": None}, '"prompt" must be text, got NoneType'),
        ({"prompt": ["1="]}, '"prompt" must be text, got list'),
        ({"prompt": " \n"}, '"prompt" is blank'),
        ({"prompt": "1=", "answer": 1.5}, '"answer" must be text or a whole number, got float'),
        ({"prompt": "1=", "answer": True}, '"answer" must be text or a whole number, got bool'),
        ({"prompt": "1=", "answer": " "}, '"answer" is blank'),
        ({"prompt": "1+2+3+4="}, "8 tokens, more than data.max_prompt_length = 6"),
        ({"messages": [{"role": "user", "content": "1"}]}, "need data.apply_chat_template = true"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Tokenizer, row: Any, message: str) -> None:
    file = write_lines(tmp_path / "bad.jsonl", {"prompt": "1="}, row, {"prompt": "2="})
    with pytest.raises(InputError) as caught:
        load([file], tokenizer, max_prompt_length=6)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"data.train_files: {file}:2")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], '"messages" must be a list'),
        ("hello", '"messages" must be a list'),
        (["hello"], 'every message needs a "role"'),
        ([{"content": "1"}], 'every message needs a "role"'),
        ([{"role": "user"}], '"content" of the user message must be text, got NoneType'),
        ([{"role": "user", "content": ""}], '"content" of the user message is blank'),
        (
            [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
            "the last message is the assistant's",
        ),
        ([{"role": "system", "content": "1"}], "no user message to add data.prompt_suffix to"),
    ],
)
def test_bad_messages_are_named(
    tmp_path: Path, chat_tokenizer: Tokenizer, messages: Any, message: str
) -> None:
    file = write_lines(tmp_path / "bad.jsonl", {"messages": messages})
    with pytest.raises(InputError) as caught:
        load([file], chat_tokenizer, apply_chat_template=True, prompt_suffix="+")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"data.train_files: {file}:1")


def test_missing_template_is_reported_with_the_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "1="})
    with pytest.raises(InputError, match=r"a\.jsonl:1: .* has no chat template"):
        load([file], tokenizer, apply_chat_template=True)


@pytest.mark.parametrize("row", [{"prompt": "1="}, {"prompt": "1=", "answer": None}])
def test_missing_answer_matters_only_where_it_is_needed(
    tmp_path: Path, tokenizer: Tokenizer, row: Any
) -> None:
    file = write_lines(tmp_path / "a.jsonl", row)
    assert load([file], tokenizer)[0].answer is None
    with pytest.raises(InputError, match=r'a\.jsonl:1 has no "answer"'):
        load([file], tokenizer, need=True)


def test_unreadable_files_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    for name, message in [
        ("absent.jsonl", "is not a file"),
        (".", "is not a file"),
        ("empty.jsonl", "is empty"),
        ("latin.jsonl", "is not UTF-8"),
    ]:
        file = str(tmp_path / name)
        with pytest.raises(InputError, match=f"data.train_files: .*{message}"):
            load([file], tokenizer)


def test_results_of_two_files_may_not_share_a_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "sub").mkdir()
    files = [
        write_lines(folder / "math.jsonl", {"prompt": "1=", "answer": "1"})
        for folder in (tmp_path, tmp_path / "sub")
    ]
    assert len(load(files, tokenizer)) == 2
    with pytest.raises(InputError, match="both be reported as 'math'"):
        load(files, tokenizer, need=True)
    with pytest.raises(InputError, match="both be reported as 'math'"):
        load([files[0], files[0]], tokenizer, need=True)


def numbered(count: int) -> list[Prompt]:
    return [
        Prompt(text=str(index), token_ids=(index,), answer=None, source="a")
        for index in range(count)
    ]


def draw(stream: PromptStream, *sizes: int) -> list[str]:
    return [prompt.text for size in sizes for prompt in stream.next_batch(size)]


@given(
    count=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 30), max_size=6),
    seed=st.integers(0, 2**32),
    shuffle=st.booleans(),
)
def test_every_epoch_has_every_prompt_once_however_it_is_cut_into_batches(
    count: int, sizes: list[int], seed: int, shuffle: bool
) -> None:
    stream = PromptStream(numbered(count), seed=seed, shuffle=shuffle)
    drawn = draw(stream, *sizes)
    assert drawn == draw(PromptStream(stream.prompts, seed=seed, shuffle=shuffle), sum(sizes))
    for start in range(0, len(drawn), count):
        epoch = drawn[start : start + count]
        assert max(Counter(epoch).values()) == 1
    assert stream.state_dict() == {
        "epoch": sum(sizes) // count,
        "index": sum(sizes) % count,
        "num_prompts": count,
    }


@given(
    count=st.integers(1, 12),
    before=st.integers(0, 40),
    after=st.integers(1, 40),
    shuffle=st.booleans(),
)
def test_resumed_stream_goes_on_as_if_it_had_never_stopped(
    count: int, before: int, after: int, shuffle: bool
) -> None:
    stream = PromptStream(numbered(count), seed=7, shuffle=shuffle)
    draw(stream, before)
    resumed = PromptStream(numbered(count), seed=7, shuffle=shuffle)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert draw(resumed, after) == draw(stream, after)


def test_orders_differ_between_epochs_and_seeds_and_ignore_the_global_generator() -> None:
    prompts = numbered(50)
    random.seed(0)
    drawn = draw(PromptStream(prompts, seed=1, shuffle=True), 150)
    random.seed(1)
    assert drawn == draw(PromptStream(prompts, seed=1, shuffle=True), 150)
    epochs = [drawn[:50], drawn[50:100], drawn[100:]]
    other_seed = draw(PromptStream(prompts, seed=2, shuffle=True), 50)
    file_order = [prompt.text for prompt in prompts]
    assert len({tuple(order) for order in [*epochs, other_seed, file_order]}) == 5
    assert draw(PromptStream(prompts, seed=1, shuffle=False), 100) == file_order * 2


def test_order_of_a_seed_is_fixed_for_ever() -> None:
    stream = PromptStream(numbered(8), seed=1234, shuffle=True)
    assert "".join(draw(stream, 16)) == "2506413724103576"


def test_position_of_other_data_is_refused() -> None:
    state = PromptStream(numbered(5), seed=1, shuffle=True).state_dict()
    with pytest.raises(
        CheckpointError, match=r"5 training prompts, but data\.train_files now has 6"
    ):
        PromptStream(numbered(6), seed=1, shuffle=True).load_state_dict(state)


def test_stream_without_prompts_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.train_files names no file"):
        PromptStream([], seed=1, shuffle=True)
