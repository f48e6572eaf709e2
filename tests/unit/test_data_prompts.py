"""Prompt files, read as they should be and with every mistake that they can have."""

import json
from pathlib import Path
from typing import Any

import pytest

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.data.prompts import Prompt, load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import InputError

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
        ("[" * 100_000, "can't be read as JSON: maximum recursion depth exceeded"),
        (
            '{"prompt": "1=", "answer": ' + "9" * 5000 + "}",
            "can't be read as JSON: Exceeds the limit (4300 digits)",
        ),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "1+2=\ud800"}, "\"prompt\" has '\\ud800' at character 5, half of a surrogate"),
        ({"prompt": "1=", "answer": "\udc00"}, "\"answer\" has '\\udc00' at character 1, half of"),
        ({"answer": "1"}, 'expected one of "prompt" and "messages", got neither'),
        ({"prompt": "1=", "messages": []}, 'expected one of "prompt" and "messages", got both'),
        ({"prompt": None}, '"prompt" must be text, got NoneType'),
        ({"prompt": ["1="]}, '"prompt" must be text, got list'),
        ({"prompt": " \n"}, '"prompt" is blank'),
        ({"prompt": "1=", "answer": " "}, '"answer" is blank'),
        ({"prompt": "1=", "answer": 1.5}, '"answer" must be text or a whole number, got float'),
        ({"prompt": "1=", "answer": True}, '"answer" must be text or a whole number, got bool'),
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
            [{"role": "user", "content": "1\udfff"}],
            "\"content\" of the user message has '\\udfff' at character 2, half of a surrogate",
        ),
        (
            [{"role": "u\ud800", "content": "1"}, {"role": "user", "content": "2"}],
            "the text that the model reads has '\\ud800' at character 3, half of a surrogate",
        ),
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


def test_surrogate_pairs_are_the_characters_that_they_stand_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    file = write_lines(
        tmp_path / "a.jsonl", '{"prompt": "1\\ud83d\\ude00=", "answer": "\\ud83d\\ude00"}'
    )
    (prompt,) = load([file], tokenizer)
    assert (prompt.text, prompt.answer) == ("1\U0001f600=", "\U0001f600")


def test_a_template_that_writes_nothing_is_refused_with_the_line_and_the_folder(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    (chat_tokenizer.folder / "chat_template.jinja").write_text("{{ '' }}")
    silent = Tokenizer.from_folder(chat_tokenizer.folder)
    file = write_lines(tmp_path / "a.jsonl", {"prompt": "1="})
    assert load([file], silent)[0].token_ids == (4, 14)
    with pytest.raises(InputError) as caught:
        load([file], silent, apply_chat_template=True)
    message = str(caught.value)
    assert message.startswith(f"data.train_files: {file}:1: the text that the model reads is ''")
    assert f"the tokenizer of {silent.folder} gives no tokens" in message


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
