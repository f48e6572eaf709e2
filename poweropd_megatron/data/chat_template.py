"""The chat template of a Hugging Face folder, rendered as transformers renders it."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from poweropd_megatron.errors import InputError

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A compiled template, and what to call it in an error."""

    compiled: Template
    place: str
    """The setting and the file that it comes from."""


def read_template(
    folder: Path, tokenizer_config: Mapping[str, Any], *, setting: str
) -> ChatTemplate | None:
    """Return the folder's compiled template, or None if it has none.

    chat_template.jinja wins over chat_template in tokenizer_config.json, which is one template or a
    list of {"name", "template"}, of which "default" is taken.

    Raises: InputError, naming `setting` and the file, for a template that is no text or doesn't
    compile.
    """
    file = folder / "chat_template.jinja"
    place = f"{setting}: the chat template of {file}"
    if file.is_file():
        try:
            source: Any = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place} can't be read as UTF-8 text: {error}") from error
    else:
        place = f"{setting}: the chat template of {folder / 'tokenizer_config.json'}"
        source = _configured_source(tokenizer_config.get("chat_template"), place)
    if source is None:
        return None
    try:
        return ChatTemplate(compiled=_environment().from_string(source), place=place)
    # Besides its own errors, Jinja lets through those of Python's compiler.
    except Exception as error:
        raise InputError(f"{place} is malformed: {error}") from error


def _configured_source(configured: Any, place: str) -> str | None:
    """Return the default template of what tokenizer_config.json says, None if there is none."""
    entries = configured if isinstance(configured, list) else []
    named = [e for e in entries if isinstance(e, dict) and {"name", "template"} <= e.keys()]
    source = configured
    if isinstance(configured, list) and len(named) == len(entries):
        source = next((e["template"] for e in reversed(named) if e["name"] == "default"), None)
    if source is not None and not isinstance(source, str):
        raise InputError(
            f"{place} is malformed: expected text or a list of {{name, template}}, got "
            f"{reprlib.repr(source)}"
        )
    return source


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    template_kwargs: Mapping[str, Any],
) -> str:
    """Return the conversation as the template writes it, ready for the model's turn.

    Keys of a message whose value is None are dropped; template_kwargs win over special_tokens.

    Raises: InputError, naming the setting and the file, if the template refuses the messages or
    fails on them.
    Source: transformers, PreTrainedTokenizerBase.apply_chat_template(add_generation_prompt=True).
    """
    context: dict[str, Any] = {
        "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **special_tokens,
        **template_kwargs,
    }
    try:
        return template.compiled.render(context)
    except TemplateError as error:
        raise InputError(f"{template.place} refused the messages: {error}") from error
    # A template is a program, and can end in any of Python's errors.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{template.place} failed on the messages with {problem}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    """Let a template refuse its messages."""
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Return the local time, for templates that write the date."""
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
