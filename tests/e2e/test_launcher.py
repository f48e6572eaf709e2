"""The launch scripts in a copy of the checkout, with a stand-in for the command line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SETTINGS = ("NNODES", "NODE_RANK", "MASTER_", "GPUS_PER_NODE", "NPROC_PER_NODE", "OMP_", "SLURM_")
FOREIGN = ("CUDA_VISIBLE_DEVICES", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "POWEROPD_")

# Says what it was started with, then behaves as its first argument tells.
COMMAND_LINE = """
import json, os, sys, time
from pathlib import Path

def main(argv):
    rank = os.environ.get("RANK", "-")
    if "--print_config" in argv:
        print("train_steps = 1")
        return 2 if "--wrong" in argv else 0
    report = {"argv": argv, "pid": os.getpid(), "WORLD_SIZE": os.environ.get("WORLD_SIZE")}
    path = Path(os.environ["REPORTS"], f"{rank}.json")
    path.with_suffix(".new").write_text(json.dumps(report))
    path.with_suffix(".new").rename(path)
    if "--fail" in argv:
        if rank == "0":
            time.sleep(0.5)
            print("the reason", file=sys.stderr, flush=True)
        return int(argv[argv.index("--fail") + 1])
    if "--hang" in argv:
        time.sleep(60)
    return 0
"""

# Stands in for Python: succeeds at once, and records how torchrun would have been started.
RECORDER = """#!/bin/bash
case "$1" in
  *torchrun.py) printf '%s\\n' "$@" >"$REPORTS/torchrun"; echo "$OMP_NUM_THREADS" >"$REPORTS/omp" ;;
  *) echo "$*" >>"$REPORTS/other" ;;
esac
"""


class Launcher:
    """The scripts of a checkout in a folder whose name has spaces, and no settings around them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.reports = folder / "reports"
        self.tools = folder / "tools"
        for path in (self.root / "poweropd_megatron" / "cli", self.reports, self.tools):
            path.mkdir(parents=True)
        shutil.copytree(REPO / "launch", self.root / "launch")
        (self.root / "poweropd_megatron" / "cli" / "main.py").write_text(COMMAND_LINE)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS + FOREIGN)}
        self.environment = kept | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "REPORTS": str(self.reports),
            "CUDA_VISIBLE_DEVICES": "",
            "POWEROPD_PYTHON": sys.executable,
        }

    def add_tool(self, name: str, text: str) -> Path:
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, *arguments: str, script: str = "pretrain_opd.sh", **variables: str):
        return subprocess.Popen(
            ["bash", self.root / "launch" / script, *arguments],
            env=self.environment | variables,
            cwd=self.tools,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **options: str) -> tuple[str, str]:
        process = self.start(*arguments, **options)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == code, stderr
        return stdout, stderr

    def torchrun(self, *arguments: str, **options: str) -> list[str]:
        """Return torchrun's own arguments, without starting it."""
        recorder = self.add_tool("recorder", RECORDER)
        _, stderr = self.run(*arguments, POWEROPD_PYTHON=str(recorder), **options)
        started = (self.reports / "torchrun").read_text().splitlines()
        assert shlex.split(stderr.splitlines()[-1])[1:] == started
        return started[1 : started.index(str(self.root / "launch" / "pretrain_opd.sh"))]

    def report(self, rank: int | str) -> dict:
        return json.loads((self.reports / f"{rank}.json").read_text())


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


@pytest.fixture
def slurm(launcher: Launcher) -> Iterator[Launcher]:
    launcher.add_tool("scontrol", '#!/bin/bash\necho "$*" >&2\necho node07\necho node08\n')
    launcher.environment |= {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_JOB_ID": "31007",
        "SLURM_STEP_ID": "0",
        "SLURM_GPUS_ON_NODE": "4",
    }
    del launcher.environment["CUDA_VISIBLE_DEVICES"]
    return launcher


def test_one_process_on_cpu_by_default(launcher):
    assert launcher.torchrun() == [
        *("--standalone", "--nnodes=1", "--local-addr=127.0.0.1", "--nproc-per-node=1")
    ]


def test_the_processes_on_cpu_share_the_cores(launcher):
    launcher.add_tool("nproc", "#!/bin/bash\necho 12\n")
    assert "--nproc-per-node=3" in launcher.torchrun(NPROC_PER_NODE="3")
    assert (launcher.reports / "omp").read_text() == "4\n"
    launcher.torchrun(NPROC_PER_NODE="20")
    assert (launcher.reports / "omp").read_text() == "1\n"
    launcher.torchrun(NPROC_PER_NODE="3", OMP_NUM_THREADS="7")
    assert (launcher.reports / "omp").read_text() == "7\n"


def test_one_process_per_gpu(launcher):
    launcher.add_tool("nvidia-smi", "#!/bin/bash\nfor i in 0 1 2; do echo GPU $i: X; done\n")
    assert "--nproc-per-node=2" in launcher.torchrun(CUDA_VISIBLE_DEVICES="0,2")
    assert "--nproc-per-node=1" in launcher.torchrun(CUDA_VISIBLE_DEVICES="")
    assert "--nproc-per-node=5" in launcher.torchrun(GPUS_PER_NODE="5")
    del launcher.environment["CUDA_VISIBLE_DEVICES"]
    assert "--nproc-per-node=3" in launcher.torchrun()


def test_several_nodes_meet_at_the_master(launcher):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    assert launcher.torchrun(**nodes)[:-1] == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=head", "--master-port=1234")
    ]


def test_slurm_gives_nodes_rank_gpus_and_the_first_host(slurm):
    assert slurm.torchrun() == [
        *("--nnodes=2", "--node-rank=1", "--master-addr=node07", "--master-port=16007"),
        "--nproc-per-node=4",
    ]


def test_variables_of_the_user_win_over_slurm(slurm):
    arguments = slurm.torchrun(MASTER_ADDR="10.0.0.1", MASTER_PORT="99", GPUS_PER_NODE="2")
    assert arguments[2:] == ["--master-addr=10.0.0.1", "--master-port=99", "--nproc-per-node=2"]
    assert "--standalone" in slurm.torchrun(NNODES="1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "two"}, "NNODES=two"),
        ({"NNODES": "0"}, "NNODES=0"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
        ({"NPROC_PER_NODE": "1; rm x"}, "NPROC_PER_NODE"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: expected a whole number from 0 to 0 (NNODES=1)"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "from 0 to 1 (NNODES=2)"),
        ({"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"}, "NODE_RANK=-1"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "65536"},
            "MASTER_PORT=65536",
        ),
        ({"GPUS_PER_NODE": "2", "NPROC_PER_NODE": "3"}, "there are 2"),
        ({"SLURM_NNODES": "2", "SLURM_LOCALID": "1"}, "--ntasks-per-node=1"),
        ({"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": ""}, "MASTER_ADDR"),
    ],
)
def test_what_cannot_work_is_refused(launcher, variables, message):
    if "PATH" in variables:
        launcher.add_tool("scontrol", "#!/bin/bash\nexit 1\n")
        del variables["PATH"]
    _, stderr = launcher.run(code=2, **variables)
    assert message in stderr
    assert len(stderr.splitlines()) <= 2


@pytest.mark.parametrize("option", ["--help", "-h", "--print_config"])
def test_questions_start_no_torchrun(launcher, option):
    recorder = launcher.add_tool("recorder", RECORDER)
    launcher.run("--config", "x", option, POWEROPD_PYTHON=str(recorder), NNODES="4")
    script = launcher.root / "launch" / "pretrain_opd.sh"
    assert (launcher.reports / "other").read_text() == f"{script} --config x {option}\n"
    assert not (launcher.reports / "torchrun").exists()


def test_wrong_settings_start_no_torchrun(launcher):
    stdout, stderr = launcher.run("--wrong", code=2)
    assert stdout == ""
    assert "torchrun" not in stderr


def test_as_python_it_trains_with_the_checkout_it_lies_in(launcher):
    script = launcher.root / "launch" / "pretrain_opd.sh"
    subprocess.run(
        [sys.executable, script, "--seed", "3"], env=launcher.environment, timeout=30, check=True
    )
    assert launcher.report("-")["argv"] == ["train", "--seed", "3"]


def test_quickstart_runs_two_processes_except_on_one_gpu(launcher):
    recorder = str(launcher.add_tool("recorder", RECORDER))
    torchrun = launcher.reports / "torchrun"
    layout = "parallel.tensor_model_parallel_size"
    for gpus, processes in (("0", 2), ("1", 1), ("8", 2)):
        launcher.run(
            *("--train_steps", "5"),
            script="quickstart.sh",
            POWEROPD_PYTHON=recorder,
            GPUS_PER_NODE=gpus,
        )
        arguments = torchrun.read_text()
        assert f"--nproc-per-node={processes}\n" in arguments
        assert "--config\nlaunch/recipes/chain_sum.toml\n" in arguments
        assert "--output_dir\nruns/quickstart\n" in arguments
        assert arguments.endswith("\n--train_steps\n5\n")
        for model in ("student", "teacher"):
            assert (f"--{model}.{layout}\n1\n" in arguments) == (processes == 1)


def test_evaluation_is_started_as_training_is(launcher):
    launcher.run("--config", "a b.toml", script="eval.sh")
    assert launcher.report(0)["argv"] == ["eval", "--config", "a b.toml"]
    launcher.run("--wrong", script="eval.sh", code=2)
    assert launcher.torchrun("eval", "--help_me") == launcher.torchrun("--help_me")


def test_two_runs_share_a_machine_one_ends_on_bad_input_and_one_on_a_signal(launcher, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    hanging = launcher.start("--hang", "a b", NPROC_PER_NODE="2", REPORTS=str(other))
    bad = launcher.start("--fail", "2", NPROC_PER_NODE="2")

    _, stderr = bad.communicate(timeout=120)
    assert bad.returncode == 2
    command, *rest = stderr.splitlines()
    assert "--standalone" in command
    assert rest == ["the reason"]

    launcher.reports = other
    deadline = time.monotonic() + 120
    while not all((other / f"{rank}.json").exists() for rank in (0, 1)):
        assert hanging.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    hanging.send_signal(signal.SIGTERM)
    hanging.communicate(timeout=30)
    assert hanging.returncode == 128 + signal.SIGTERM
    for rank in (0, 1):
        report = launcher.report(rank)
        assert report["argv"] == ["train", "--hang", "a b"]
        assert report["WORLD_SIZE"] == "2"
        with pytest.raises(ProcessLookupError):
            os.kill(report["pid"], 0)
