"""The folder that a command writes to: whether it can be, and by one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from poweropd_megatron.errors import ConfigError
from poweropd_megatron.parallel import world


def check_output_dir(path: Path) -> None:
    """Return if output_dir is a folder or can be made, and written to. Raises: ConfigError."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir: {path.absolute()} is a file; name a folder")
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"output_dir: {existing} is a file; name a folder that can be made")
    if not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir: {existing} can't be written to; name another folder")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold output_dir for this job, on rank 0; it is made if it isn't there."""
    with ExitStack() as held:
        world.on_first_rank(lambda: held.enter_context(locked(folder)))
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold output_dir for this process; it is made if it isn't there. Raises: ConfigError."""
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / ".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output_dir: another run is writing to {folder}") from None
        except OSError as error:
            raise ConfigError(f"output_dir: {folder} can't be locked: {error}") from None
        yield
