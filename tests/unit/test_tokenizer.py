"""The tokenizer of a folder against transformers', and every way a folder can be wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.data.tokenizer import Tokenizer, check_same_vocabulary
from poweropd_megatron.errors import ConfigError, InputError

EXAMPLE = Path(__file__).parents[2] / "examples" / "chain_sum"


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example student's tokenizer files."""
    target = tmp_path / "student"
    shutil.copytree(EXAMPLE / "student", target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_example_gives_the_ids_and_texts_of_transformers() -> None:
    ours, theirs = Tokenizer.from_folder(EXAMPLE / "student"), reference(EXAMPLE / "student")
    for text in ["5+9+0=", "5+9=14;14+0=14#14", "5+9=14<eos>", "7-1", "a 5\n+", ""]:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids == theirs(text).input_ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs) == 18
    assert ours.eos_token_ids == (theirs.eos_token_id,) == (1,)
    assert ours.special_tokens == theirs.special_tokens_map


@given(text=st.text(alphabet="0123456789+=;#-"))
def test_example_tokenizer_gives_each_character_a_token_and_back(text: str) -> None:
    tokenizer = Tokenizer.from_folder(EXAMPLE / "teacher")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_rows_of_the_model_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = Tokenizer.from_folder(EXAMPLE / "student")
    assert tokenizer.decode([8, 18, 23, 13]) == "5+"


def test_folder_without_a_template_says_what_to_do() -> None:
    tokenizer = Tokenizer.from_folder(EXAMPLE / "student")
    with pytest.raises(InputError, match=r"data\.apply_chat_template = false"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [17, 1]}, {"eos_token_id": 5}, (17, 1)),
        ({"eos_token_id": 3}, {"eos_token_id": 5}, (3,)),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, (0,)),
        ({}, {"eos_token_id": 5}, (5,)),
        (None, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": None}, {}, (1,)),
        (None, None, (1,)),
    ],
)
def test_eos_comes_from_the_first_file_that_names_it(
    folder: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        (folder / name).unlink()
        if content is not None:
            write_json(folder / name, content)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.eos_token_id == expected[0]


def remove_every_eos(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    write_json(folder / "config.json", {})
    edit_json(folder / "tokenizer_config.json", eos_token=None)


def give_an_added_token_another_id(folder: Path) -> None:
    tokens = {"0": {"content": "<pad>"}, "20": {"content": "<eos>"}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "slow tokenizer only": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        r"tokenizer\.json is missing.*save_pretrained",
    ),
    "bad tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        r"tokenizer\.json is not a usable tokenizer",
    ),
    "no tokenizer config": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        r"tokenizer_config\.json is missing",
    ),
    "bad tokenizer config": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json can't be read as JSON",
    ),
    "bad generation config": (
        lambda f: (f / "generation_config.json").write_bytes(b"\xff"),
        r"generation_config\.json can't be read as JSON",
    ),
    "generation config of another type": (
        lambda f: (f / "generation_config.json").write_text("[1]"),
        r"generation_config\.json holds a list, expected an object",
    ),
    "no eos": (
        remove_every_eos,
        r"names no EOS token; set eos_token_id in generation_config\.json",
    ),
    "bad template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        r"chat_template\.jinja is malformed",
    ),
    "nested too deeply": (
        lambda f: (f / "tokenizer_config.json").write_text("[" * 100_000),
        r"tokenizer_config\.json can't be read as JSON: maximum recursion depth",
    ),
    "added tokens in a list": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder=[1]),
        r"tokenizer_config\.json: added_tokens_decoder must be an object of ids and tokens",
    ),
    "added token without content": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"0": {}}),
        r"tokenizer_config\.json: added_tokens_decoder\['0'\] is \{\}, expected text or",
    ),
    "added token of another type": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"0": 7}),
        r"tokenizer_config\.json: added_tokens_decoder\['0'\] is 7, expected text or",
    ),
    "added token without an id": (
        lambda f: edit_json(
            f / "tokenizer_config.json", added_tokens_decoder={"one": {"content": "<eos>"}}
        ),
        r"'<eos>' the id one, tokenizer\.json 1;",
    ),
    "special token of another type": (
        lambda f: edit_json(f / "tokenizer_config.json", eos_token={"text": "<eos>"}),
        r"tokenizer_config\.json: eos_token is \{'text': '<eos>'\}, expected text or",
    ),
    "template of another type": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=5),
        r"tokenizer_config\.json is malformed: expected text or a list .*, got 5",
    ),
    "list of bare templates": (
        lambda f: edit_json(f / "tokenizer_config.json", chat_template=["x"]),
        r"tokenizer_config\.json is malformed: expected text or a list .*, got \['x'\]",
    ),
    "named template of another type": (
        lambda f: edit_json(
            f / "tokenizer_config.json", chat_template=[{"name": "default", "template": 5}]
        ),
        r"tokenizer_config\.json is malformed: expected text or a list .*, got 5",
    ),
    "template in another encoding": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"),
        r"chat_template\.jinja can't be read as UTF-8 text",
    ),
    "moved added token": (give_an_added_token_another_id, r"'<eos>' the id 20, tokenizer\.json 1;"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_unusable_folder_names_the_setting_and_the_file(folder: Path, name: str) -> None:
    break_folder, message = BREAKAGES[name]
    break_folder(folder)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.from_folder(folder, setting="teacher.path")
    assert str(caught.value).startswith("teacher.path: ")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ([99], "99"),
        (24, "24"),
        ([1, 24], "24"),
        (-1, "-1"),
        ("<eos>", "'<eos>'"),
        ("", "''"),
        (["1"], "'1'"),
        (1.0, "1.0"),
        (True, "True"),
        ({"id": 1}, "{'id': 1}"),
    ],
)
def test_eos_that_no_row_of_the_model_has_is_refused(
    folder: Path, name: str, named: Any, shown: str
) -> None:
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    write_json(folder / name, content | {"eos_token_id": named})
    with pytest.raises(InputError) as caught:
        Tokenizer.from_folder(folder, setting="teacher.path")
    assert str(caught.value) == (
        f"teacher.path: {folder / name}: eos_token_id has {shown}, expected whole numbers from 0 "
        "to 23 (vocab_size of config.json)"
    )


def test_eos_may_be_any_row_of_the_model_or_any_token_where_its_size_is_unknown(
    folder: Path,
) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 23]})
    assert Tokenizer.from_folder(folder).eos_token_ids == (0, 23)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has 23, .* from 0 to 17 \(tokenizer\.json\)$"):
        Tokenizer.from_folder(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 17]})
    assert Tokenizer.from_folder(folder).eos_token_ids == (0, 17)


def test_same_tokenizer_with_another_eos_is_accepted(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": 0})
    edit_json(folder / "tokenizer_config.json", eos_token="<pad>")
    student, teacher = Tokenizer.from_folder(EXAMPLE / "student"), Tokenizer.from_folder(folder)
    check_same_vocabulary(student, teacher)
    assert student.eos_token_id != teacher.eos_token_id


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Tokenizer:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    write_json(folder / "tokenizer.json", content)
    return Tokenizer.from_folder(folder)


def test_other_ids_are_refused_by_name(folder: Path) -> None:
    def swap(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= {"0": 4, "1": 3, "x": 18}

    student, teacher = Tokenizer.from_folder(EXAMPLE / "student"), change_tokenizer(folder, swap)
    with pytest.raises(ConfigError) as caught:
        check_same_vocabulary(student, teacher)
    message = str(caught.value)
    assert "student.path" in message
    assert "teacher.path" in message
    assert "token '0' is 3 for the student and 4 for the teacher" in message
    assert "token '1' is 4 for the student and 3 for the teacher" in message
    assert "token 'x' is absent for the student and 18 for the teacher" in message


def test_an_extra_added_token_is_refused(folder: Path) -> None:
    token = {"id": 18, "content": "<think>", "special": False, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    teacher = change_tokenizer(folder, lambda content: content["added_tokens"].append(token))
    with pytest.raises(ConfigError, match="'<think>' is absent for the student and 18"):
        check_same_vocabulary(Tokenizer.from_folder(EXAMPLE / "student"), teacher)


def test_only_the_first_differences_are_listed(folder: Path) -> None:
    def shift(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {t: i if i < 3 else i + 1 for t, i in vocabulary.items()}

    teacher = change_tokenizer(folder, shift)
    with pytest.raises(ConfigError, match="15 tokens differ in all") as caught:
        check_same_vocabulary(Tokenizer.from_folder(EXAMPLE / "student"), teacher)
    assert str(caught.value).count("for the student") == 5
