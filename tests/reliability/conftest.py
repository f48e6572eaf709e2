"""Folders and processes of the tests that break things."""

from collections.abc import Callable
from typing import Any

import pytest
from support.cli_run import fork, join


@pytest.fixture(scope="session")
def call_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int | None]]:
    """Return a function that calls another on forked ranks, and returns their exit codes."""

    def call(target: Callable[..., Any], *args: Any, world_size: int = 1) -> list[int | None]:
        logs = tmp_path_factory.mktemp("logs")
        codes = join(fork(target, *args, world_size=world_size, logs=logs))
        for log in sorted(logs.glob("*.*")):
            print(f"--- {log.name} of {target.__name__}\n{log.read_text()}")
        return codes

    return call
