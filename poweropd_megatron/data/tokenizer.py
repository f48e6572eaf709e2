"""The tokenizer of a Hugging Face folder: text, token ids, EOS ids and the chat template.

Reads tokenizer.json with the `tokenizers` library, so that nothing here imports transformers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from poweropd_megatron.data import chat_template
from poweropd_megatron.data.chat_template import ChatTemplate, Message
from poweropd_megatron.errors import ConfigError, InputError
from poweropd_megatron.json_file import read_json

MAX_LISTED_DIFFERENCES = 5
WRITE_TOKENIZER = "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back, as the folder's files say."""

    folder: Path
    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    """Every token that ends a response; the first is the primary one."""
    special_tokens: dict[str, str]
    """bos_token, eos_token and so on, where the folder sets them; chat templates use them."""
    template: ChatTemplate | None

    @classmethod
    def from_folder(cls, path: str | Path, *, setting: str = "student.path") -> "Tokenizer":
        """Return the tokenizer of a Hugging Face folder.

        Raises: InputError, naming `setting` and the file, if one is missing or malformed, or none
        says which token is EOS.
        """
        folder = Path(path)
        backend = _read_backend(folder, setting)
        config = read_json(folder / CONFIG_NAME, setting)
        _check_added_tokens(backend, config, folder, setting)
        special_tokens = {
            name: _token_text(config[name], name, folder, setting)
            for name in SPECIAL_TOKEN_NAMES
            if config.get(name)
        }
        return cls(
            folder=folder,
            backend=backend,
            eos_token_ids=_find_eos(folder, backend, special_tokens, setting),
            special_tokens=special_tokens,
            template=chat_template.read_template(folder, config, setting=setting),
        )

    @property
    def eos_token_id(self) -> int:
        """Return the primary EOS token."""
        return self.eos_token_ids[0]

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, added ones included; the model may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens written in it count, none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; ids that no token has (spare model rows) give nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        """Return the conversation as the chat template writes it, ready for the model's turn.

        Raises: InputError if the folder has no chat template, or it refuses the messages.
        """
        if self.template is None:
            raise InputError(
                f"{self.folder} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); add one, or set data.apply_chat_template = false"
            )
        return chat_template.render(self.template, messages, self.special_tokens, template_kwargs)


def check_same_vocabulary(student: Tokenizer, teacher: Tokenizer) -> None:
    """Return if both tokenizers give a text the same token ids; their EOS tokens may differ.

    Raises: ConfigError listing the first differences, naming student.path and teacher.path.
    """
    student_text, teacher_text = student.backend.to_str(), teacher.backend.to_str()
    if student_text == teacher_text:
        return
    differences = _vocabulary_differences(student, teacher)
    student_json, teacher_json = json.loads(student_text), json.loads(teacher_text)
    for section in ("normalizer", "pre_tokenizer"):
        if student_json[section] != teacher_json[section]:
            differences.append(f"{section} differs")
    if student_json["model"].get("merges") != teacher_json["model"].get("merges"):
        differences.append("model.merges differ")
    if differences:
        raise ConfigError(
            f"student.path ({student.folder}) and teacher.path ({teacher.folder}) have different "
            "tokenizers, but the teacher scores the student's token ids; choose a teacher with the "
            "student's tokenizer. In tokenizer.json: " + "; ".join(differences)
        )


def _vocabulary_differences(student: Tokenizer, teacher: Tokenizer) -> list[str]:
    """Return a line for each of the first tokens whose ids differ, and how many differ in all."""
    student_ids = student.backend.get_vocab(with_added_tokens=True)
    teacher_ids = teacher.backend.get_vocab(with_added_tokens=True)
    entries = sorted(
        student_ids.items() ^ teacher_ids.items(), key=lambda entry: (entry[1], entry[0])
    )
    tokens = list(dict.fromkeys(token for token, _ in entries))
    lines = [
        f"token {token!r} is {student_ids.get(token, 'absent')} for the student and "
        f"{teacher_ids.get(token, 'absent')} for the teacher"
        for token in tokens[:MAX_LISTED_DIFFERENCES]
    ]
    if len(tokens) > MAX_LISTED_DIFFERENCES:
        lines.append(f"{len(tokens)} tokens differ in all")
    return lines


def _read_backend(folder: Path, setting: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of tokenizer.json, without the truncation and padding it may ask for."""
    file = folder / "tokenizer.json"
    if not folder.is_dir():
        raise InputError(f"{setting}: {folder} is not a folder")
    if not file.is_file():
        raise InputError(
            f"{setting}: {file} is missing. If the folder has its tokenizer in another format "
            f"(vocab.json and merges.txt, tokenizer.model), write it with {WRITE_TOKENIZER}"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    # The bindings raise plain Exception for every malformed file.
    except Exception as error:
        raise InputError(f"{setting}: {file} is not a usable tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_added_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: Path, setting: str
) -> None:
    """Refuse added tokens that tokenizer.json lacks: transformers would encode other ids."""
    entries = config.get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise InputError(
            f"{setting}: {folder / CONFIG_NAME}: added_tokens_decoder must be an object of ids and "
            f"tokens, not {type(entries).__name__}; write it again with {WRITE_TOKENIZER}"
        )
    for index, entry in entries.items():
        content = _token_text(entry, f"added_tokens_decoder[{index!r}]", folder, setting)
        if str(backend.token_to_id(content)) != index:
            raise InputError(
                f"{setting}: in {folder}, {CONFIG_NAME} gives {content!r} the id {index}, "
                f"tokenizer.json {backend.token_to_id(content)}; write both again with "
                f"{WRITE_TOKENIZER}"
            )


def _token_text(token: Any, name: str, folder: Path, setting: str) -> str:
    """Return a token's text, given as it is or as an object with "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise InputError(
            f"{setting}: {folder / CONFIG_NAME}: {name} is {token!r}, expected text or an object "
            f'with "content"; write it again with {WRITE_TOKENIZER}'
        )
    return content


def _find_eos(
    folder: Path,
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    setting: str,
) -> tuple[int, ...]:
    """Return the EOS ids of generation_config.json, config.json or tokenizer_config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            named = read_json(folder / name, setting).get("eos_token_id")
            if named is not None and named != []:
                ids = named if isinstance(named, list) else [named]
                _check_eos_ids(ids, folder, folder / name, backend, setting)
                return tuple(ids)
    eos_id = backend.token_to_id(special_tokens.get("eos_token", ""))
    if eos_id is None:
        raise InputError(
            f"{setting}: {folder} names no EOS token; set eos_token_id in generation_config.json"
        )
    return (eos_id,)


def _check_eos_ids(
    ids: Sequence[Any], folder: Path, file: Path, backend: tokenizers.Tokenizer, setting: str
) -> None:
    """Refuse EOS ids that no row of the model has: no response would end, or a gather fail."""
    config_file = folder / "config.json"
    config = read_json(config_file, setting) if config_file.is_file() else {}
    num_ids, source = config.get("vocab_size"), "vocab_size of config.json"
    if type(num_ids) is not int:
        num_ids, source = max(backend.get_vocab().values(), default=-1) + 1, "tokenizer.json"
    for index in ids:
        if type(index) is not int or not 0 <= index < num_ids:
            raise InputError(
                f"{setting}: {file}: eos_token_id has {index!r}, expected whole numbers from 0 to "
                f"{num_ids - 1} ({source})"
            )
