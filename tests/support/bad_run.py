"""Runs that must be refused: what they say, and the models that they are given."""

import json
import shutil
from pathlib import Path
from typing import Any

from support.cli_run import REPO

NO_EVALUATION = ("--data.eval_files=[]", "--eval.interval=0")
EXAMPLE = REPO / "examples" / "chain_sum"


def only_message(stderr: str) -> str:
    """Return the one message on stderr; there is no traceback."""
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("poweropd: error: ")]
    return line.removeprefix("poweropd: error: ")


def copied(name: str, target: Path, **config: Any) -> Path:
    """Return a copy of the bundled student or teacher with changes to its config.json."""
    shutil.copytree(EXAMPLE / name, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target
