"""Chat templates and byte-level BPE: the same texts and ids as transformers gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from poweropd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from poweropd_megatron.errors import ConfigError, InputError

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'forbidden' %}
        {{- raise_exception('role forbidden is not supported') }}
    {%- endif %}
    {%- if message.role == 'skipped' %}{% continue %}{% endif %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + eos_token }}
    {%- if message.name is defined %}{{ message.name }}{% endif %}
    {% if loop.last %}
    {{- '\\n' }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{%- if with_year %}{{ strftime_now('%Y') }}{% endif %}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 1+1? Héllo 你好"}],
    [
        {"role": "system", "content": "Be <b>brief</b> & kind."},
        {"role": "skipped", "content": "never seen"},
        {"role": "user", "content": "a\n\nb ", "name": None},
        {"role": "assistant", "content": "<think>\nq\n</think>\n\nanswer"},
        {"role": "user", "content": "again <|im_end|> inside"},
    ],
]


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer with ChatML tokens and a post-processor that would add tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CHAT_TEMPLATE, "What is the answer? The answer is two."], trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CHAT_TOKENS])
    end = backend.token_to_id("<|im_end|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    backend.enable_truncation(5)
    backend.enable_padding(length=40)
    folder = tmp_path / "chat"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "chat_template": CHAT_TEMPLATE,
            "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(folder / "generation_config.json", {"eos_token_id": [end, end - 2]})
    return folder


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize(
    "template_kwargs",
    [
        {},
        {"enable_thinking": False},
        {"enable_thinking": True, "with_year": True},
        {"tools": [{"name": "é <b>"}]},
    ],
)
def test_rendered_chat_equals_that_of_transformers(
    chat_folder: Path, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]
) -> None:
    ours, theirs = Tokenizer.from_folder(chat_folder), reference(chat_folder)
    text = ours.render_chat(messages, **template_kwargs)
    assert text == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **template_kwargs
    )
    ids = ours.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_tokens_in_text_are_recognised_and_none_is_added(chat_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder)
    start, end = map(tokenizer.backend.token_to_id, CHAT_TOKENS[1:])
    ids = tokenizer.encode("<|im_start|>a long enough text to be cut<|im_end|>a")
    assert ids[0] == start
    assert ids[-2] == end
    assert tokenizer.decode(ids) == "a long enough text to be cuta"


def test_template_file_wins_over_the_config(chat_folder: Path) -> None:
    (chat_folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    rendered = Tokenizer.from_folder(chat_folder).render_chat([{"role": "user", "content": "a"}])
    assert rendered == "a!"


def test_the_default_of_named_templates_is_taken(chat_folder: Path) -> None:
    templates = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "default"}]
    edit_json(chat_folder / "tokenizer_config.json", chat_template=templates)
    assert Tokenizer.from_folder(chat_folder).render_chat([]) == "default"


def test_template_that_refuses_messages_says_why(chat_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(chat_folder)
    with pytest.raises(InputError, match=r"tokenizer_config\.json refused .*: role forbidden"):
        tokenizer.render_chat([{"role": "forbidden", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
    ],
)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_template_that_fails_names_the_setting_the_file_and_the_error(
    chat_folder: Path, place: str, source: str, problem: str
) -> None:
    if place == "chat_template.jinja":
        (chat_folder / place).write_text(source)
    else:
        edit_json(chat_folder / place, chat_template=source)
    tokenizer = Tokenizer.from_folder(chat_folder, setting="student.path")
    with pytest.raises(InputError) as caught:
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert str(caught.value).startswith(
        f"student.path: the chat template of {chat_folder / place} failed on the messages with "
        f"{problem}"
    )


def test_template_cannot_reach_python(chat_folder: Path) -> None:
    unsafe = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    (chat_folder / "chat_template.jinja").write_text(unsafe)
    with pytest.raises(InputError, match="unsafe"):
        Tokenizer.from_folder(chat_folder).render_chat([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["model"]["merges"].pop(), r"model\.merges differ"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "normalizer differs"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), "pre_tokenizer"),
    ],
)
def test_other_splitting_of_text_is_refused(
    chat_folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    student = Tokenizer.from_folder(chat_folder)
    content = json.loads((chat_folder / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    write_json(chat_folder / "tokenizer.json", content)
    teacher = Tokenizer.from_folder(chat_folder)
    with pytest.raises(ConfigError, match=message) as caught:
        check_same_vocabulary(student, teacher)
    assert "for the student" not in str(caught.value)
