"""The fields of a prompt file's row, each checked where it is read."""

import json
import math
from collections.abc import Mapping
from typing import Any

from poweropd_megatron.config.schema import PromptConfig
from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.errors import InputError


def parse_row(line: str, place: str) -> dict[str, Any]:
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


def render(row: Mapping[str, Any], tokenizer: Tokenizer, data: PromptConfig, place: str) -> str:
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
    refuse_lone_surrogates(value, name, place)
    return value


def refuse_lone_surrogates(text: str, name: str, place: str) -> None:
    """Refuse what JSON can escape, but neither a tokenizer nor a UTF-8 file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: {name} has {text[error.start]!r} at character {error.start + 1}, half of a "
            "surrogate pair, which is no character; write the whole pair or remove it"
        ) from error


def read_answer(row: Mapping[str, Any], place: str, *, may_be_blank: bool) -> str | None:
    """Return the answer as text; None if it is absent or null, or blank where it may be.

    Evaluation's may be, so that all lines without an answer can be told of at once.
    """
    answer = row.get("answer")
    is_blank = isinstance(answer, str) and not answer.strip()
    if answer is None or (is_blank and may_be_blank):
        return None
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        raise InputError(
            f'{place}: "answer" must be text or a whole number, got {type(answer).__name__}; '
            "write it as text"
        )
    return _read_text(answer, '"answer"', place)


def read_id(row: Mapping[str, Any], place: str) -> str | None:
    """Return the prompt's id as text; None if it has none."""
    identity = row.get("id")
    if identity is None or isinstance(identity, str):
        return identity
    if isinstance(identity, int) and not isinstance(identity, bool):
        return str(identity)
    raise InputError(f'{place}: "id" must be text or a whole number, got {type(identity).__name__}')


def read_tolerance(row: Mapping[str, Any], place: str) -> float | None:
    """Return the largest absolute difference from the answer that is right; None for none."""
    tolerance = row.get("tolerance")
    if tolerance is None:
        return None
    is_number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not is_number or not 0 < tolerance < math.inf:
        raise InputError(f'{place}: "tolerance" must be a positive number, got {tolerance!r}')
    return float(tolerance)
