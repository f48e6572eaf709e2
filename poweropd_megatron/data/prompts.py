"""Prompt files, read and checked in full before a run starts, and the endless stream of prompts."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.data import benchmarks
from poweropd_megatron.data.rows import (
    parse_row,
    read_answer,
    read_id,
    read_tolerance,
    refuse_lone_surrogates,
    render,
)
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import CheckpointError, InputError

OWN_FORMAT = "prompt"
"""The project's own format, in data.eval_formats."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the student is asked."""

    text: str
    """The rendered text, suffix and chat template included."""
    token_ids: tuple[int, ...]
    answer: str | None
    source: str
    """Stem of the file that it came from."""
    id: str | None = None
    """What the file calls it; read for evaluation only."""
    tolerance: float | None = None
    """A number is right if it differs from the answer by at most this."""


def load_prompts(
    files: Sequence[str],
    tokenizer: Tokenizer,
    data: PromptConfig,
    *,
    setting: str,
    need_answers: bool,
) -> list[Prompt]:
    """Return the prompts of all files, in order.

    A line is {"prompt": text} or {"messages": [{"role", "content"}, ...]}; other keys are ignored.
    With need_answers it also has "answer" (text or a whole number) and may have "id" and
    "tolerance", or it is a row of one of the benchmarks.

    Raises: InputError, naming `setting` ("data.train_files"), the file and the line of the first
    prompt that can't be used, or all lines without the answer that is needed; also if need_answers
    and two files have one stem, which results are reported under, or two prompts one id.
    """
    if not need_answers:
        return [
            prompt for file in files for prompt in _load_file(Path(file), tokenizer, data, setting)
        ]
    _check_distinct_stems(files, setting)
    _check_formats(files, data)
    return [
        prompt for file in files for prompt in _load_answered(Path(file), tokenizer, data, setting)
    ]


class PromptStream:
    """An endless stream of prompts; every epoch has each prompt once.

    The order of an epoch depends on the seed and the epoch's number alone, so the position says all
    that a resumed run needs to go on as if it had never stopped.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        if not prompts:
            raise InputError("data.train_files names no file; give at least one file of prompts")
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self._start_epoch(0)

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """Return the next prompts; a batch may end one epoch and begin the next."""
        batch: list[Prompt] = []
        while len(batch) < num_prompts:
            chosen = self._order[self._index : self._index + num_prompts - len(batch)]
            batch += [self.prompts[position] for position in chosen]
            self._index += len(chosen)
            if self._index == len(self.prompts):
                self._start_epoch(self._epoch + 1)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"epoch": self._epoch, "index": self._index, "num_prompts": len(self.prompts)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position that state_dict returned.

        Raises: CheckpointError if it belongs to another number of prompts.
        """
        if state["num_prompts"] != len(self.prompts):
            raise CheckpointError(
                f"the checkpoint was written with {state['num_prompts']} training prompts, but "
                f"data.train_files now has {len(self.prompts)}; give the files of the first "
                "run, or start a new run in another output_dir"
            )
        self._start_epoch(state["epoch"])
        self._index = state["index"]

    def _start_epoch(self, epoch: int) -> None:
        """Go to the first prompt of an epoch."""
        self._epoch = epoch
        self._index = 0
        self._order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)


def _check_distinct_stems(files: Sequence[str], setting: str) -> None:
    """Refuse two files whose results would have one name."""
    seen: dict[str, str] = {}
    for file in files:
        stem = Path(file).stem
        if stem in seen:
            raise InputError(
                f"{setting}: {seen[stem]} and {file} would both be reported as {stem!r}; rename one"
            )
        seen[stem] = file


def _check_formats(files: Sequence[str], data: PromptConfig) -> None:
    """Refuse formats of files that aren't there, and formats that don't exist."""
    stems = [Path(file).stem for file in files]
    for stem, name in data.eval_formats.items():
        if stem not in stems:
            raise InputError(
                f"data.eval_formats names {stem!r}, but data.eval_files has {', '.join(stems)}"
            )
        if name not in (OWN_FORMAT, *benchmarks.FORMATS):
            known = ", ".join((OWN_FORMAT, *benchmarks.FORMATS))
            raise InputError(
                f"data.eval_formats: {name!r} of {stem} is no known format; known are {known}"
            )


def _load_answered(
    file: Path, tokenizer: Tokenizer, data: PromptConfig, setting: str
) -> Iterator[Prompt]:
    """Yield the prompts of one file, all with answers, and no two with one id."""
    named = data.eval_formats.get(file.stem)
    if named:
        format = benchmarks.FORMATS.get(named)
    else:
        format = benchmarks.detect(_read_rows(file, setting), stem=file.stem)
    missing: list[int] = []
    line_of: dict[str, int] = {}
    for number, prompt in enumerate(
        _load_file(file, tokenizer, data, setting, is_answered=True, format=format), start=1
    ):
        if prompt.answer is None:
            missing.append(number)
        if prompt.id is not None and line_of.setdefault(prompt.id, number) != number:
            raise InputError(
                f"{setting}: {file}:{number} has the id {prompt.id!r} of line "
                f"{line_of[prompt.id]}; remove one, or give each its own"
            )
        yield prompt
    if missing:
        first, *others = missing
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        also = f"; nor have {len(others)} other lines: {shown}" if others else ""
        gold = format.gold if format else '"answer"'
        raise InputError(f"{setting}: {file}:{first} has no {gold}, which evaluation needs{also}")


def _load_file(
    file: Path,
    tokenizer: Tokenizer,
    data: PromptConfig,
    setting: str,
    *,
    is_answered: bool = False,
    format: benchmarks.Format | None = None,
) -> Iterator[Prompt]:
    """Yield the prompts of one file; with is_answered, read what evaluation needs beside them."""
    for place, row in _read_rows(file, setting):
        if format:
            row = benchmarks.as_prompt(row, format, place)
        text = render(row, tokenizer, data, place)
        yield Prompt(
            text=text,
            token_ids=_encode(text, tokenizer, data.max_prompt_length, place),
            answer=read_answer(row, place, may_be_blank=is_answered),
            source=file.stem,
            id=read_id(row, place) if is_answered else None,
            tolerance=read_tolerance(row, place) if is_answered else None,
        )


def _read_rows(file: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of one file, which has some, each with its place."""
    if not file.is_file():
        raise InputError(f"{setting}: {file} is not a file")
    num_lines = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for num_lines, line in enumerate(lines, start=1):
                place = f"{setting}: {file}:{num_lines}"
                yield place, parse_row(line, place)
    except UnicodeDecodeError as error:
        raise InputError(f"{setting}: {file} is not UTF-8 text: {error}") from error
    if num_lines == 0:
        raise InputError(f"{setting}: {file} is empty; expected one JSON object a line")


def _encode(text: str, tokenizer: Tokenizer, max_length: int, place: str) -> tuple[int, ...]:
    """Return the token ids of a prompt that has some, and not too many."""
    refuse_lone_surrogates(text, "the text that the model reads", place)
    token_ids = tuple(tokenizer.encode(text))
    if not token_ids:
        raise InputError(
            f"{place}: the text that the model reads is {text!r}, which the tokenizer of "
            f"{tokenizer.folder} gives no tokens; change the prompt, or the folder's chat template "
            "if data.apply_chat_template is set"
        )
    if len(token_ids) > max_length:
        raise InputError(
            f"{place}: the prompt has {len(token_ids)} tokens, more than data.max_prompt_length = "
            f"{max_length}; raise that or remove the line"
        )
    return token_ids
