"""Rows of the benchmark files as their publishers name the fields, and how to tell them apart.

A row becomes {"prompt", "answer"} and, where there are some, "id" and "tolerance".
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poweropd_megatron.errors import InputError

Row = Mapping[str, Any]

_QUESTIONS = ("problem", "question", "Problem")
_IDS = ("id", "unique_id", "ID", "idx")
_ANSWERS = ("answer", "Answer")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the rows of one benchmark's files are read."""

    name: str
    is_like: Callable[[Row], bool]
    """Whether a row has the fields that tell this format."""
    answer: Callable[[Row], str | int | None]
    """The gold answer of a row, None where it is missing. Raises: ValueError saying what is wrong.
    """
    gold: str = '"answer"'
    """What a row without a gold answer lacks, as messages name it."""


def detect(rows: Iterable[tuple[str, Row]], *, stem: str) -> Format | None:
    """Return the format that a file's rows have the fields of, None for the project's own.

    The rows come with their places. The first tells; where it has no answer, which formats are
    told by, the next does.

    Raises: InputError if there is none, or several.
    """
    unlike = None
    for place, row in rows:
        if "prompt" in row or "messages" in row:
            return None
        fitting = [format for format in FORMATS.values() if format.is_like(row)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            names = " or ".join(format.name for format in fitting)
            raise InputError(
                f"{place}: the fields {_fields(row)} could be {names}; say which with "
                f'data.eval_formats = {{{stem} = "{fitting[0].name}"}}'
            )
        unlike = unlike or (place, row)
        if _answer(row) is not None:
            break
    assert unlike is not None
    place, row = unlike
    raise InputError(
        f'{place}: expected one of "prompt" and "messages", got neither, and the fields '
        f"{_fields(row)} are of no known benchmark. If they can be read as one of "
        f'{", ".join(FORMATS)}, name it with data.eval_formats = {{{stem} = "..."}}'
    )


def as_prompt(row: Row, format: Format, place: str) -> dict[str, Any]:
    """Return a row under the names of the project's own format; without an answer if it lacks one.

    Raises: InputError naming the place and the field that can't be used.
    """
    question = _first(row, _QUESTIONS)
    if question is None:
        raise InputError(f'{place}: a row of {format.name} needs "problem" or "question"')
    if row.get("modality") == "Multimodal":
        raise InputError(f"{place}: the question has images, which the models here can't see")
    if row.get("context"):
        question = f"{row['context']}\n{question}"
    try:
        answer = format.answer(row)
        tolerance = _tolerance(row) if format.name == "olympiadbench" else None
    except ValueError as error:
        raise InputError(f"{place}: {error}, in a row of {format.name}") from None
    if isinstance(answer, str) and not answer.strip():
        answer = None
    converted = {"prompt": question, "answer": answer, "id": _first(row, _IDS)}
    return converted if tolerance is None else converted | {"tolerance": tolerance}


def last_boxed(text: str) -> str | None:
    r"""Return what the last \boxed{...} of a solution holds, braces paired; None without one."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip() or None
    return None


def _first(row: Row, names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _fields(row: Row) -> str:
    return ", ".join(map(repr, row))


def _answer(row: Row) -> Any:
    """Return what a row has for an answer; None where it is absent, null or blank."""
    answer = _first(row, _ANSWERS)
    return None if isinstance(answer, str) and not answer.strip() else answer


def _of_gsm8k(row: Row) -> str | None:
    """Return what follows the last #### of a worked answer, without thousands separators."""
    _, marker, answer = str(row.get("answer")).rpartition("####")
    return answer.strip().lstrip("$").replace(",", "") if marker else None


def _of_math500(row: Row) -> str | int | None:
    answer = _answer(row)
    if answer is None or (isinstance(answer, str | int) and not isinstance(answer, bool)):
        return answer
    raise ValueError(f'"answer" must be text, got {type(answer).__name__}')


def _of_aime(row: Row) -> int | None:
    answer = _whole(_answer(row))
    if answer is None and isinstance(row.get("solution"), str):
        answer = _whole(last_boxed(row["solution"]))
    if answer is not None and not 0 <= answer <= 999:
        raise ValueError(f"the answer is {answer}, but those of AIME are whole, from 0 to 999")
    return answer


def _of_amc(row: Row) -> str | int | None:
    """Return the answer, whole where it is: the files have 142.0 for 142."""
    answer = _answer(row)
    if isinstance(answer, float):
        # From 2**53 on, neighbouring whole numbers are the same float.
        if not abs(answer) < 2**53:
            raise ValueError(f"the answer is {answer}; give a finite number below 2**53, or text")
        return int(answer) if answer.is_integer() else str(answer)
    if isinstance(answer, str):
        text = answer.strip()
        if re.fullmatch(r"[+-]?(nan|inf|infinity)", text, re.IGNORECASE):
            raise ValueError(f"the answer is {answer!r}, which is no number")
        return re.sub(r"^(-?)0*(\d+)(\.0*)?$", r"\1\2", text)
    return _of_math500(row)


def _of_minerva(row: Row) -> str | int | None:
    return last_boxed(str(row.get("solution"))) if _answer(row) is None else _of_math500(row)


def _of_olympiadbench(row: Row) -> str | None:
    r"""Return the final answers, several as one list: $1$ and $2$ as \boxed{1, 2}."""
    answers = row.get("final_answer")
    if isinstance(answers, str):
        answers = [answers]
    if not answers:
        return None
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise ValueError('"final_answer" must be a list of texts')
    if len(answers) > 1 and row.get("is_multiple_answer") is False:
        raise ValueError('"final_answer" has several answers, but "is_multiple_answer" is false')
    plain = [re.sub(r"(?<!\\)\$", "", answer).strip() for answer in answers]
    if not all(plain):
        return None
    return plain[0] if len(plain) == 1 else ", ".join(plain)


def _tolerance(row: Row) -> float | None:
    """Return the largest absolute difference of OlympiadBench's "error"; null allows none."""
    error = row.get("error")
    if error is None or error == "":
        return None
    try:
        tolerance = float(error)
    except (TypeError, ValueError):
        tolerance = -1.0
    if not 0 < tolerance < float("inf"):
        raise ValueError(f'"error" must be a positive number such as "1e-2", got {error!r}')
    return tolerance


def _whole(answer: Any) -> int | None:
    if answer is None:
        return None
    text = str(answer).strip()
    if not re.fullmatch(r"\d+(\.0+)?", text):
        raise ValueError(f"the answer is {answer!r}, but those of AIME are whole, from 0 to 999")
    return int(text.partition(".")[0])


def _is_gsm8k(row: Row) -> bool:
    return "question" in row and "####" in str(row.get("answer"))


def _is_math500(row: Row) -> bool:
    return "problem" in row and ("unique_id" in row or {"answer", "subject", "level"} <= row.keys())


def _is_short_answer(row: Row) -> bool:
    """Whether a row has a question, a whole number for an answer, and nothing of other files."""
    number = re.fullmatch(r"-?\d+(\.0+)?", str(_first(row, _ANSWERS)).strip())
    return (
        _first(row, _QUESTIONS) is not None
        and number is not None
        and not _is_math500(row)
        and "final_answer" not in row
    )


def _names(row: Row, benchmark: str) -> bool:
    """Whether the row's address or id has the benchmark's name."""
    return any(benchmark in str(row.get(name)).upper() for name in ("url", *_IDS))


def _is_aime(row: Row) -> bool:
    is_whole = "." not in str(_first(row, _ANSWERS))
    return _is_short_answer(row) and is_whole and not _names(row, "AMC")


def _is_amc(row: Row) -> bool:
    has_solution = _first(row, ("solution", "Solution", "year")) is not None
    return _is_short_answer(row) and not has_solution and not _names(row, "AIME")


def _is_minerva(row: Row) -> bool:
    return (
        "problem" in row
        and _answer(row) is None
        and not _is_math500(row)
        and not _names(row, "AIME")
        and last_boxed(str(row.get("solution"))) is not None
    )


def _is_olympiadbench(row: Row) -> bool:
    return {"question", "final_answer"} <= row.keys()


FORMATS = {
    format.name: format
    for format in (
        Format(
            name="gsm8k",
            is_like=_is_gsm8k,
            answer=_of_gsm8k,
            gold='final answer after #### in "answer"',
        ),
        Format(name="math500", is_like=_is_math500, answer=_of_math500),
        Format(name="aime", is_like=_is_aime, answer=_of_aime),
        Format(name="amc", is_like=_is_amc, answer=_of_amc),
        Format(
            name="minerva",
            is_like=_is_minerva,
            answer=_of_minerva,
            gold='\\boxed{...} answer in "solution"',
        ),
        Format(
            name="olympiadbench",
            is_like=_is_olympiadbench,
            answer=_of_olympiadbench,
            gold='"final_answer"',
        ),
    )
}
"""The benchmarks by the names of data.eval_formats."""
