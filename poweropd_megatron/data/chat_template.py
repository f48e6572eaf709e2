"""The chat template of a Hugging Face folder, rendered as transformers renders it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from poweropd_megatron.errors import InputError

Message = Mapping[str, Any]


def read_template(
    folder: Path, tokenizer_config: Mapping[str, Any], *, setting: str
) -> Template | None:
    """Return the folder's compiled template, or None if it has none.

    chat_template.jinja wins over chat_template in tokenizer_config.json, which is one template or a
    list of {"name", "template"}, of which "default" is taken.

    Raises: InputError, naming `setting` and the file, for a template that doesn't compile.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        source: Any = file.read_text(encoding="utf-8")
    else:
        file = folder / "tokenizer_config.json"
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if source is None:
        return None
    try:
        return _environment().from_string(source)
    except TemplateError as error:
        raise InputError(f"{setting}: the chat template of {file} is malformed: {error}") from error


def render(
    template: Template,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    template_kwargs: Mapping[str, Any],
) -> str:
    """Return the conversation as the template writes it, ready for the model's turn.

    Keys of a message whose value is None are dropped; template_kwargs win over special_tokens.

    Raises: InputError if the template refuses the messages.
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
        return template.render(context)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the chat template refused the messages: {error}") from error


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
