"""Two conversions to one folder: the one that holds it is left alone, whatever ends the other."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import qwen3_folder

from poweropd_megatron.checkpoint.store import verify
from poweropd_megatron.conversion import partial
from poweropd_megatron.conversion.to_megatron import to_megatron
from poweropd_megatron.errors import InputError


@pytest.fixture
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    qwen3_folder.write(folder)
    return folder


class Other:
    """A conversion that holds the folder, and has no part done."""

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        (self.path / ".journal").mkdir(parents=True)
        (self.path / "begun").write_text("work")
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def assert_unharmed(self) -> None:
        assert {entry.name for entry in self.path.iterdir()} == {".journal", "begun"}

    def end(self) -> None:
        os.close(self._lock)


@pytest.fixture
def other(tmp_path: Path) -> Other:
    return Other(tmp_path / "out")


def when_waiting(monkeypatch: pytest.MonkeyPatch, function: Callable[[], None]) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: function())


def test_a_refused_conversion_leaves_the_others_work(source, other, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_SECONDS_TO_WAIT", 0.1)
    with pytest.raises(InputError, match=r"--output: another conversion is writing to .*out"):
        to_megatron(source, tmp_path / "out")
    other.assert_unharmed()


def test_an_interrupt_while_it_waits_leaves_the_others_work(source, other, tmp_path, monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    when_waiting(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        to_megatron(source, tmp_path / "out")
    other.assert_unharmed()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_told_in_one_line(number, source, other, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"--output: .*\.out\.partial can't be locked: ") as caught:
        to_megatron(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    other.assert_unharmed()


def test_what_the_other_publishes_meanwhile_is_left_alone(source, other, tmp_path, monkeypatch):
    def publish() -> None:
        other.path.rename(tmp_path / "out")
        other.end()

    when_waiting(monkeypatch, publish)
    with pytest.raises(InputError, match=r"--output: .*out exists already"):
        to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "begun").read_text() == "work"


def test_a_folder_that_the_other_removes_meanwhile_is_made_anew(
    source, other, tmp_path, monkeypatch
):
    def give_up() -> None:
        shutil.rmtree(other.path)
        other.end()

    when_waiting(monkeypatch, give_up)
    to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out" / "weights")
