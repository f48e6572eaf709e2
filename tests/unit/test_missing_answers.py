"""Benchmark files with rows that lack their gold answer: refused with the lines of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_rows import (
    AIME_BY_ADDRESS,
    AIME_WITH_SOLUTION,
    AMC,
    GSM8K,
    MATH500,
    MINERVA,
    OLYMPIADBENCH,
)

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.data.prompts import load_prompts
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import InputError

ABSENT = object()
AIME = AIME_BY_ADDRESS | {"url": "2025_AIME_I"}
OWN = {"prompt": "1+1=", "answer": "2"}
NO_BOX = AIME_WITH_SOLUTION | {"solution": "There are 204."}
FORMATS = {
    "prompt": (OWN, "answer", '"answer"', [ABSENT, None, "", " \n"]),
    "gsm8k": (
        GSM8K,
        "answer",
        'final answer after #### in "answer"',
        [ABSENT, None, "", " ", "It is 42.\n#### ", "#### $", "It is 42."],
    ),
    "math500": (MATH500, "answer", '"answer"', [ABSENT, None, "", " "]),
    "aime": (
        AIME_BY_ADDRESS | {"url": "2025_AIME_I"},
        "answer",
        '"answer"',
        [ABSENT, None, "", " "],
    ),
    "aime with solutions": (NO_BOX, "answer", '"answer"', [ABSENT, None, "", " "]),
    "amc": (AMC, "answer", '"answer"', [ABSENT, None, "", " "]),
    "minerva": (
        MINERVA,
        "solution",
        '\\boxed{...} answer in "solution"',
        [ABSENT, None, "", " ", "It is 10.", "\\boxed{}"],
    ),
    "olympiadbench": (
        OLYMPIADBENCH,
        "final_answer",
        '"final_answer"',
        [ABSENT, None, "", [], [" "], ["$3$", "$$"]],
    ),
}
"""By format: a row, the field of its answer, what messages call it, and what is no answer."""


@pytest.fixture(scope="module")
def tokenizer(student_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(student_folder)


def refused(file: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], **data: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptConfig(eval_files=[str(file)], **data)
    with pytest.raises(InputError) as caught:
        load_prompts([str(file)], tokenizer, config, setting="data.eval_files", need_answers=True)
    return str(caught.value)


def with_answers(row: dict[str, Any], field: str, answers: list[Any]) -> list[dict[str, Any]]:
    """Return a row for each answer, none with an id but those that tell the format."""
    plain = {name: value for name, value in row.items() if name not in ("id", "idx")}
    rows = [plain | {field: answer} for answer in answers]
    for number, row in enumerate(rows):
        row |= {name: f"{row[name]}-{number}" for name in ("unique_id",) if name in row}
        if row[field] is ABSENT:
            del row[field]
    return rows


@pytest.mark.parametrize("is_first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("is_named", [False, True], ids=["detected", "named"])
@pytest.mark.parametrize("format", FORMATS)
def test_all_lines_without_an_answer_are_named(
    tmp_path: Path, tokenizer: Tokenizer, format: str, is_named: bool, is_first: bool
) -> None:
    row, field, gold, blanks = FORMATS[format]
    answers = [*blanks, row[field]] if is_first else [row[field], *blanks]
    rows = with_answers(row, field, answers)
    data = {"eval_formats": {"bench": format.split()[0]}} if is_named else {}
    first, *others = range(1 if is_first else 2, len(blanks) + (1 if is_first else 2))
    assert refused(tmp_path / "bench.jsonl", tokenizer, rows, **data) == (
        f"data.eval_files: {tmp_path / 'bench.jsonl'}:{first} has no {gold}, which evaluation "
        f"needs; nor have {len(others)} other lines: {', '.join(map(str, others))}"
    )


def test_no_more_than_eleven_lines_are_listed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [OWN, *[{"prompt": "1="}] * 14]
    text = refused(tmp_path / "bench.jsonl", tokenizer, rows)
    assert ':2 has no "answer", which evaluation needs; nor have 13 other lines: 3, 4, 5' in text
    assert text.endswith("12, ...")


def test_rows_of_no_known_format_are_not_told_by_later_ones(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    unknown = {"question": "What is $2x/2$?", "answer": "x"}
    for rows in ([unknown, GSM8K], [{"question": "?"}, unknown, GSM8K], [{"question": "?"}]):
        text = refused(tmp_path / "bench.jsonl", tokenizer, rows)
        assert ":1: " in text
        assert "are of no known benchmark" in text
