"""A copy of the checkout's scripts, with stand-ins for Python and for setup.py."""

import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TOOLS = (
    *("bash", "cat", "cksum", "cp", "dirname", "env", "find", "flock", "head", "ls", "mkdir"),
    *("mv", "paste", "rm", "sed", "sleep", "sort", "tail", "tr"),
)

# Makes environments that are copies of itself; $PIP_SECONDS and $PIP_EXIT tell how pip goes.
STAND_IN = """#!/bin/bash
case "$*" in
  "-") cat >/dev/null; echo ok ;;
  "- "*) cat >/dev/null; echo everything; exit 1 ;;
  "--version" | "-VV") echo Python 3.12.99 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo "venv" >>"$CALLS" ;;
  "-m pip "*)
    echo "$*" >>"$CALLS"; echo "pip says hello"
    case "$*" in *--editable*) sleep "${PIP_SECONDS:-0}" & wait $! ;; esac
    echo "pip ended" >>"$CALLS"; exit "${PIP_EXIT:-0}" ;;
esac
"""

BUILD = """import os, pathlib, sys
with open(os.environ["CALLS"], "a") as calls:
    print(*sys.argv, file=calls)
pathlib.Path("build", "extension.txt").write_text("CPU kernels, said setup.py\\n")
sys.exit(int(os.environ.get("BUILD_EXIT", "0")))
"""

TOO_OLD = "#!/bin/bash\ncat >/dev/null; echo is too old; [[ $# == 1 ]]\n"


@dataclass
class Checkout:
    """A copy of the scripts in a folder whose name has spaces, and a PATH without any Python."""

    root: Path
    bin: Path
    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> list[str]:
        path = self.home / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        paths = {"PATH": str(self.bin), "HOME": str(self.home), "CALLS": str(self.home / "calls")}
        return paths | self.variables

    def add_python(self, path: Path, text: str = STAND_IN) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.root / "launch" / "setup_env.sh", *arguments],
            env=self.environment | variables,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background of a script inherits an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def setup(self, *arguments: str, code: int = 0, **variables: str) -> tuple[str, str]:
        process = self.start(*arguments, **variables)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == code, stderr
        return stdout, stderr
