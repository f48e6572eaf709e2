"""The checkpoint store on real files: complete or invisible, verified, never overwritten."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from poweropd_megatron.checkpoint.store import (
    MANIFEST_NAME,
    CheckpointStore,
    digest,
    read_manifest,
    verify,
)
from poweropd_megatron.errors import CheckpointError

FILES = {"__0_0.distcp": b"weights" * 500, "__1_0.distcp": b"moments" * 500, ".metadata": b"index"}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def write(store: CheckpointStore, step: int) -> Path:
    """Write the files of a checkpoint without publishing it."""
    partial = store.begin(step)
    for name, content in FILES.items():
        (partial / name).write_bytes(b"%d" % step + content)
    return partial


def publish(store: CheckpointStore, step: int) -> Path:
    partial = write(store, step)
    return store.publish(partial, step, {file.name: digest(file) for file in partial.iterdir()})


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_published_checkpoint_is_where_path_says_with_its_files_and_a_manifest(store):
    assert store.steps() == []
    final = publish(store, 7)
    assert final == store.path(7) == store.root / "step_000007"
    assert store.steps() == [7]
    found = contents(final)
    manifest = json.loads(found.pop(MANIFEST_NAME))
    assert found == {name: b"7" + content for name, content in FILES.items()}
    assert manifest["step"] == 7
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in found.items()
    }
    assert read_manifest(final) == manifest["files"]
    verify(final)
    assert [entry.name for entry in store.root.iterdir()] == ["step_000007"]


def test_steps_are_in_numeric_order_beyond_six_digits(store):
    for step in (1_000_000, 999_999, 12):
        publish(store, step)
    assert store.steps() == [12, 999_999, 1_000_000]


def test_nothing_is_visible_before_it_is_published(store):
    publish(store, 1)
    write(store, 2)
    assert store.steps() == [1]


def test_a_published_step_is_never_overwritten(store):
    final = publish(store, 3)
    before = contents(store.root)
    with pytest.raises(CheckpointError, match=r"step_000003 exists already.*never overwritten"):
        store.begin(3)
    assert contents(store.root) == before
    verify(final)


def test_what_is_not_a_checkpoint_is_not_listed(store):
    publish(store, 5)
    for name in ("step_6", "step_000007.old", "old_step_000008", ".step_000009.partial", "notes"):
        (store.root / name).mkdir()
    assert store.steps() == [5]


def test_what_crashed_saves_left_is_ignored_and_then_removed(store):
    publish(store, 1)
    for step in (2, 4):
        store.partial(step).mkdir()
        (store.partial(step) / "__0_0.distcp").write_bytes(b"torn")
    assert store.steps() == [1]
    partial = store.begin(4)
    assert list(partial.iterdir()) == []
    assert {entry.name for entry in store.root.iterdir()} == {"step_000001", partial.name}


def test_a_discarded_checkpoint_leaves_nothing(store):
    publish(store, 1)
    partial = write(store, 2)
    store.discard(partial)
    store.discard(partial)
    assert [entry.name for entry in store.root.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_digests_that_do_not_cover_the_files_are_refused_and_nothing_appears(store, change):
    partial = write(store, 2)
    digests = {file.name: digest(file) for file in partial.iterdir()}
    if change == "missing":
        del digests["__1_0.distcp"]
    else:
        digests["__2_0.distcp"] = digests["__1_0.distcp"]
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        store.publish(partial, 2, digests)
    assert store.steps() == []


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def swap_with_a_neighbour(file: Path) -> None:
    other = file.with_name("__1_0.distcp")
    mine, its = file.read_bytes(), other.read_bytes()
    file.write_bytes(its)
    other.write_bytes(mine)


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_byte, "is corrupt"),
        (swap_with_a_neighbour, "is corrupt"),
        (truncate, r"has 3500 bytes, the manifest says 3501"),
        (lengthen, r"has 3502 bytes, the manifest says 3501"),
        (Path.unlink, "is missing"),
        (replace_by_a_folder, "is missing"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(store, damage, reason):
    publish(store, 1)
    final = publish(store, 2)
    damage(final / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=reason) as caught:
        verify(final)
    assert str(caught.value).startswith(str(final / "__0_0.distcp"))
    assert f"restore it, or delete {final} to resume from the checkpoint before it" in str(
        caught.value
    )
    verify(store.path(1))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "\x00\x01",
        '{"step": 2, "files": {',
        "[]",
        "7",
        "{}",
        '{"files": []}',
        '{"files": {"__0_0.distcp": null}}',
        '{"files": {"__0_0.distcp": {}}}',
        '{"files": {"__0_0.distcp": {"bytes": "many", "sha256": "0"}}}',
    ],
)
def test_a_garbage_manifest_is_named_with_what_to_do(store, text):
    final = publish(store, 2)
    manifest = final / MANIFEST_NAME
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        verify(final)
    assert str(caught.value).startswith(str(manifest))
    assert f"delete {final}" in str(caught.value)


def test_some_files_can_be_verified_alone(store):
    final = publish(store, 2)
    flip_a_byte(final / "__0_0.distcp")
    verify(final, ["__1_0.distcp", ".metadata"])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is corrupt"):
        verify(final, ["__1_0.distcp", "__0_0.distcp"])


def test_prune_keeps_the_newest_and_says_what_is_gone(store):
    for step in (1, 2, 3, 4):
        publish(store, step)
    assert store.prune(2) == [1, 2]
    assert sorted(entry.name for entry in store.root.iterdir()) == ["step_000003", "step_000004"]
    assert store.prune(2) == []
    assert store.prune(1) == [3]
    assert store.prune(1) == []
    verify(store.path(4))


def test_prune_never_touches_the_newest_even_where_it_is_the_only_one(store):
    assert store.prune(1) == []
    final = publish(store, 1)
    before = contents(final)
    assert store.prune(1) == []
    assert contents(final) == before


def test_a_delete_that_is_interrupted_leaves_no_half_checkpoint_visible(store, monkeypatch):
    for step in (1, 2):
        publish(store, step)

    def interrupted(path: Path, **_: object) -> None:
        (path / "__0_0.distcp").unlink()
        raise OSError(errno.EIO, "went away")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(OSError, match="went away"):
            store.prune(1)
    assert store.steps() == [2]
    store.begin(3)
    assert not store.partial(1).exists()


def test_a_disk_that_refuses_is_a_checkpoint_error_that_says_so(store, monkeypatch):
    partial = write(store, 2)
    digests = {file.name: digest(file) for file in partial.iterdir()}

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"step_000002.*No space left on device"):
        store.publish(partial, 2, digests)
    assert store.steps() == []


def test_a_root_that_cannot_be_made_is_a_checkpoint_error_that_names_it(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"step_000001.partial can't be made"):
        store.begin(1)
