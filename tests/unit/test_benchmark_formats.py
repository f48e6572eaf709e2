"""Rows of the benchmark files: told apart, read, and refused with their lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_rows import (
    AIME_WITH_SOLUTION,
    AMC,
    GSM8K,
    MATH500,
    OLYMPIADBENCH,
    OLYMPIADBENCH_PHYSICS,
    ROWS,
)

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.data.benchmarks import FORMATS, detect, last_boxed
from poweropd_megatron.data.prompts import Prompt, load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.evaluation.prompts import read_eval_prompts

CASES = [(name, row, answer) for name, rows in ROWS.items() for row, answer in rows]


@pytest.fixture(scope="module")
def tokenizer(student_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(student_folder)


def load(folder: Path, tokenizer: Tokenizer, *rows: dict[str, Any], **data: Any) -> list[Prompt]:
    file = folder / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(
        [str(file)],
        tokenizer,
        PromptConfig(eval_files=[str(file)], **data),
        setting="data.eval_files",
        need_answers=True,
    )


def refused(folder: Path, tokenizer: Tokenizer, *rows: dict[str, Any], **data: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, tokenizer, *rows, **data)
    return str(caught.value)


@pytest.mark.parametrize(("name", "row", "answer"), CASES)
def test_each_format_is_told_by_its_fields_and_read(
    tmp_path: Path, tokenizer: Tokenizer, name: str, row: dict[str, Any], answer: str
) -> None:
    format = detect([("here", row)], stem="bench")
    assert format is FORMATS[name]
    (prompt,) = load(tmp_path, tokenizer, row)
    question = row.get("problem") or row.get("question") or row["Problem"]
    assert prompt.text.endswith(question)
    assert prompt.answer == answer
    (named,) = load(tmp_path, tokenizer, row, eval_formats={"bench": name})
    assert named == prompt


def test_ids_and_tolerances_and_contexts_come_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, second = load(tmp_path, tokenizer, OLYMPIADBENCH, OLYMPIADBENCH_PHYSICS)
    assert (first.id, first.tolerance) == ("1606", None)
    assert (second.id, second.tolerance) == ("1607", 0.1)
    assert second.text == "A stone falls from rest.\nHow far does it fall in one second?"
    assert load(tmp_path, tokenizer, MATH500)[0].id == "test/prealgebra/1.json"
    assert load(tmp_path, tokenizer, GSM8K)[0].id is None


@pytest.mark.parametrize(
    ("final_answer", "expected"),
    [
        (["$2$, $3$"], "2, 3"),
        (["$\\frac{1}{2n+2}$"], "\\frac{1}{2n+2}"),
        ("$(1, 2)$", "(1, 2)"),
        (["\\$30"], "\\$30"),
        (["1", " $2$ ", "3"], "1, 2, 3"),
    ],
)
def test_final_answers_lose_their_dollars_and_become_one(
    tmp_path: Path, tokenizer: Tokenizer, final_answer: Any, expected: str
) -> None:
    (prompt,) = load(tmp_path, tokenizer, OLYMPIADBENCH | {"final_answer": final_answer})
    assert prompt.answer == expected


def test_the_suffix_is_added_to_questions_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (prompt,) = load(tmp_path, tokenizer, AMC, prompt_suffix=" Think.")
    assert prompt.text == "What is $100 + 42$? Think."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"problem": "1+1?", "answer": "2"},
            "the fields 'problem', 'answer' could be aime or amc; say which with "
            'data.eval_formats = {bench = "aime"}',
        ),
        (
            {"problem": "1+1?", "answer": "x+1"},
            "the fields 'problem', 'answer' are of no known benchmark",
        ),
        ({"question": "1+1?", "answer": "4.83"}, "are of no known benchmark"),
        ({"text": "1+1?"}, "got neither, and the fields 'text' are of no known benchmark"),
        ({"question": "1+1?"}, "are of no known benchmark"),
    ],
)
def test_fields_of_several_formats_or_of_none_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], message: str
) -> None:
    text = refused(tmp_path, tokenizer, row)
    assert message in text
    assert text.startswith(f"data.eval_files: {tmp_path / 'bench.jsonl'}:1: ")


def test_a_named_format_needs_only_the_fields_that_it_reads(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    row = {"question": "What is $2x/2$?", "answer": "x"}
    (prompt,) = load(tmp_path, tokenizer, row, eval_formats={"bench": "math500"})
    assert (prompt.text, prompt.answer) == ("What is $2x/2$?", "x")
    (own,) = load(
        tmp_path, tokenizer, {"prompt": "1=", "answer": 1}, eval_formats={"bench": "prompt"}
    )
    assert own.answer == "1"


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"bench": "gsm9k"}, "'gsm9k' of bench is no known format; known are prompt, gsm8k, math"),
        ({"other": "gsm8k"}, "data.eval_formats names 'other', but data.eval_files has bench"),
        ({"bench": 3}, "3 of bench is no known format"),
    ],
)
def test_formats_that_do_not_exist_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, formats: dict[str, Any], message: str
) -> None:
    assert message in refused(tmp_path, tokenizer, GSM8K, eval_formats=formats)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (GSM8K, {"question": ""}, '"prompt" is blank'),
        (MATH500, {"answer": ["3/4"]}, '"answer" must be text, got list'),
        (MATH500, {"problem": None}, 'a row of math500 needs "problem" or "question"'),
        (AIME_WITH_SOLUTION, {"answer": "1000"}, "the answer is 1000, but those of AIME"),
        (AIME_WITH_SOLUTION, {"answer": "x"}, "the answer is 'x', but those of AIME"),
        (MATH500, {"answer": True}, '"answer" must be text, got bool'),
        (AMC, {"answer": True}, '"answer" must be text, got bool'),
        (AMC, {"answer": False}, '"answer" must be text, got bool'),
        (AMC, {"answer": float("nan")}, "the answer is nan; give a finite number"),
        (AMC, {"answer": float("-inf")}, "the answer is -inf; give a finite number"),
        (AMC, {"answer": 2.0**53}, "give a finite number below 2**53, or text"),
        (AMC, {"answer": "NaN"}, "the answer is 'NaN', which is no number"),
        (AMC, {"answer": "-Infinity"}, "the answer is '-Infinity', which is no number"),
        (OLYMPIADBENCH, {"is_multiple_answer": False}, '"is_multiple_answer" is false'),
        (OLYMPIADBENCH, {"final_answer": [3]}, '"final_answer" must be a list of texts'),
        (OLYMPIADBENCH, {"error": "small"}, '"error" must be a positive number'),
        (OLYMPIADBENCH, {"error": -0.5}, '"error" must be a positive number'),
        (OLYMPIADBENCH, {"modality": "Multimodal"}, "the question has images"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(
    tmp_path: Path,
    tokenizer: Tokenizer,
    row: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    bad = row | changes | ({"id": 9} if "id" in row else {})
    if "unique_id" in row:
        bad["unique_id"] = "other"
    if "idx" in row:
        bad["idx"] = 9
    text = refused(tmp_path, tokenizer, row, bad)
    assert message in text
    assert text.startswith(f"data.eval_files: {tmp_path / 'bench.jsonl'}:2: ")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (12345678901234567, "12345678901234567"),
        ("12345678901234567.0", "12345678901234567"),
        (10**400 + 1, str(10**400 + 1)),
        ("9" * 5000, "9" * 5000),
        (142.0, "142"),
        (-3.0, "-3"),
        ("007", "7"),
        ("0", "0"),
        ("00.00", "0"),
        ("100", "100"),
        (0.25, "0.25"),
        ("2.50", "2.50"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
    ],
)
def test_answers_of_amc_are_kept_to_the_last_digit(
    tmp_path: Path, tokenizer: Tokenizer, answer: Any, expected: str
) -> None:
    (prompt,) = load(tmp_path, tokenizer, AMC | {"answer": answer}, eval_formats={"bench": "amc"})
    assert prompt.answer == expected


def test_two_rows_with_one_id_are_refused_with_both_lines(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    other = AMC | {"id": 7}
    text = refused(tmp_path, tokenizer, AMC, other, AMC)
    assert ":3 has the id '0' of line 1; remove one, or give each its own" in text
    own = {"prompt": "1=", "answer": "1", "id": "a"}
    assert ":2 has the id 'a' of line 1" in refused(tmp_path, tokenizer, own, own)


def test_tolerances_need_a_check_that_reads_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    load(tmp_path, tokenizer, OLYMPIADBENCH_PHYSICS)
    data = PromptConfig(eval_files=[str(tmp_path / "bench.jsonl")])
    with pytest.raises(ConfigError, match=r"bench allows .* up to 0\.1: set data\.answer_check"):
        read_eval_prompts(data, tokenizer, max_prompts=None)
    data.answer_check = "math"
    assert list(read_eval_prompts(data, tokenizer, max_prompts=None)) == ["bench"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{1} and \\boxed{\\frac{2}{3}}.", "\\frac{2}{3}"),
        ("\\fbox{ 7 }", "7"),
        ("\\boxed{1} but \\boxed{2", "1"),
        ("\\boxed{}", None),
        ("none", None),
    ],
)
def test_the_last_box_is_read_with_its_braces_paired(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected
