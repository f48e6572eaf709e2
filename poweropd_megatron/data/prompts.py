"""Prompt files, read and checked in full before a run starts, and the endless stream of prompts."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poweropd_megatron.config.schema import DataConfig
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import CheckpointError, InputError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the student is asked."""

    text: str
    """The rendered text, suffix and chat template included."""
    token_ids: tuple[int, ...]
    answer: str | None
    source: str
    """Stem of the file that it came from."""


def load_prompts(
    files: Sequence[str],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    setting: str,
    need_answers: bool,
) -> list[Prompt]:
    """Return the prompts of all files, in order.

    A line is {"prompt": text} or {"messages": [{"role", "content"}, ...]}, with "answer" (text or a
    whole number) where need_answers is set; other keys are ignored.

    Raises: InputError, naming `setting` ("data.train_files"), the file and the line of the first
    prompt that can't be used; also if need_answers and two files have one stem, which results are
    reported under.
    """
    if need_answers:
        _check_distinct_stems(files, setting)
    return [
        prompt
        for file in files
        for prompt in _load_file(Path(file), tokenizer, data, setting, need_answers)
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


def _load_file(
    file: Path, tokenizer: Tokenizer, data: DataConfig, setting: str, need_answers: bool
) -> Iterator[Prompt]:
    """Yield the prompts of one file."""
    if not file.is_file():
        raise InputError(f"{setting}: {file} is not a file")
    num_lines = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for num_lines, line in enumerate(lines, start=1):
                place = f"{setting}: {file}:{num_lines}"
                row = _parse_row(line, place)
                text = _render(row, tokenizer, data, place)
                yield Prompt(
                    text=text,
                    token_ids=_encode(text, tokenizer, data.max_prompt_length, place),
                    answer=_read_answer(row, need_answers, place),
                    source=file.stem,
                )
    except UnicodeDecodeError as error:
        raise InputError(f"{setting}: {file} is not UTF-8 text: {error}") from error
    if num_lines == 0:
        raise InputError(f"{setting}: {file} is empty; expected one JSON object a line")


def _parse_row(line: str, place: str) -> dict[str, Any]:
    """Return the JSON object of a line."""
    if not line.strip():
        raise InputError(f"{place} is blank; expected a JSON object, so remove the line")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not valid JSON: {error}") from error
    # Python's own limits: on the digits of a whole number, and on how deep lists may be nested.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} can't be read as JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _render(row: Mapping[str, Any], tokenizer: Tokenizer, data: DataConfig, place: str) -> str:
    """Return the text that the model reads: with the suffix, and through the chat template."""
    if ("prompt" in row) == ("messages" in row):
        both = "both" if "prompt" in row else "neither"
        raise InputError(f'{place}: expected one of "prompt" and "messages", got {both}')
    if "messages" in row:
        if not data.apply_chat_template:
            raise InputError(f'{place}: "messages" need data.apply_chat_template = true')
        messages = _read_messages(row["messages"], data.prompt_suffix, place)
    else:
        prompt = _read_text(row["prompt"], '"prompt"', place) + data.prompt_suffix
        if not data.apply_chat_template:
            return prompt
        messages = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.render_chat(messages, **data.chat_template_kwargs)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _read_messages(messages: Any, suffix: str, place: str) -> list[dict[str, Any]]:
    """Return a conversation that waits for the model, suffix added to its last user message."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{place}: "messages" must be a list of {{"role", "content"}}')
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f'{place}: every message needs a "role" and a "content"')
        _read_text(message.get("content"), f'"content" of the {message["role"]} message', place)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: the last message is the assistant's, but the model is to write it; remove it"
        )
    if not suffix:
        return messages
    user_turns = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not user_turns:
        raise InputError(f"{place}: no user message to add data.prompt_suffix to")
    last = messages[user_turns[-1]]
    extended = {**last, "content": last["content"] + suffix}
    return [extended if message is last else message for message in messages]


def _read_text(value: Any, name: str, place: str) -> str:
    """Return a text that must be there and not blank."""
    if not isinstance(value, str):
        raise InputError(f"{place}: {name} must be text, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{place}: {name} is blank")
    _refuse_lone_surrogates(value, name, place)
    return value


def _refuse_lone_surrogates(text: str, name: str, place: str) -> None:
    """Refuse what JSON can escape, but neither a tokenizer nor a UTF-8 file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: {name} has {text[error.start]!r} at character {error.start + 1}, half of a "
            "surrogate pair, which is no character; write the whole pair or remove it"
        ) from error


def _read_answer(row: Mapping[str, Any], need_answers: bool, place: str) -> str | None:
    """Return the answer as text; None if there is none and none is needed."""
    answer = row.get("answer")
    if answer is None:
        if need_answers:
            raise InputError(f'{place} has no "answer", which evaluation needs')
        return None
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        raise InputError(
            f'{place}: "answer" must be text or a whole number, got {type(answer).__name__}; '
            "write it as text"
        )
    return _read_text(answer, '"answer"', place)


def _encode(text: str, tokenizer: Tokenizer, max_length: int, place: str) -> tuple[int, ...]:
    """Return the token ids of a prompt that has some, and not too many."""
    _refuse_lone_surrogates(text, "the text that the model reads", place)
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
