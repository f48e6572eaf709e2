"""launch/setup_env.sh in a copy of the checkout, with a stand-in for Python that records pip."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkout_copy import BUILD, REPO, TOO_OLD, TOOLS, Checkout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path / "a check out", tmp_path / "bin", tmp_path / "home")
    (checkout.root / "launch").mkdir(parents=True)
    checkout.bin.mkdir()
    checkout.home.mkdir()
    shutil.copy(REPO / "launch" / "setup_env.sh", checkout.root / "launch")
    for name in ("constraints.txt", "pyproject.toml"):
        shutil.copy(REPO / name, checkout.root)
    (checkout.root / "setup.py").write_text(BUILD)
    (checkout.root / "csrc" / "cpu").mkdir(parents=True)
    for name in ("numerics.h", "cpu/module.cpp"):
        shutil.copy(REPO / "csrc" / name, checkout.root / "csrc" / name)
    for tool in TOOLS:
        if path := shutil.which(tool):
            (checkout.bin / tool).symlink_to(path)
    return checkout


@pytest.fixture
def checkout_with_python(checkout: Checkout) -> Checkout:
    checkout.add_python(checkout.bin / "python3.12")
    return checkout


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_a_python_it_says_what_it_tried_and_how_to_get_one(checkout):
    checkout.add_python(checkout.bin / "python3.12", "#!/bin/bash\nexit 127\n")
    checkout.add_python(checkout.bin / "python3", TOO_OLD)
    _, stderr = checkout.setup(code=2)
    assert f"{checkout.bin}/python3.12 does not run" in stderr
    assert f"{checkout.bin}/python3 is too old" in stderr
    assert "uv python install 3.12" in stderr
    assert "pyenv install 3.12" in stderr


def test_a_broken_shim_is_passed_over_for_an_installed_version(checkout):
    checkout.add_python(checkout.bin / "python3.12", "#!/bin/bash\nexit 127\n")
    checkout.add_python(checkout.home / ".pyenv" / "versions" / "3.12.99" / "bin" / "python3")
    _, stderr = checkout.setup()
    assert ".pyenv/versions/3.12.99/bin/python3" in stderr


def test_a_second_run_installs_nothing(checkout_with_python):
    first, stderr = checkout_with_python.setup()
    assert first.startswith("export POWEROPD_PYTHON=")
    assert "PYTHONPATH" not in first
    assert "installing the other pinned packages" in stderr
    calls = checkout_with_python.calls
    assert calls.count("venv") == 1
    assert "--no-build-isolation --editable ." in calls[-2]
    assert str(checkout_with_python.root / "constraints.txt") in calls[-2]

    again, stderr = checkout_with_python.setup()
    assert again == first
    assert stderr == ""
    assert checkout_with_python.calls == calls


@pytest.mark.parametrize(
    "name",
    ["constraints.txt", "pyproject.toml", "setup.py", "csrc/numerics.h", "csrc/cpu/module.cpp"],
)
def test_a_changed_pin_or_kernel_is_installed_into_the_same_environment(checkout_with_python, name):
    checkout_with_python.setup()
    with (checkout_with_python.root / name).open("a") as file:
        file.write("# changed\n")
    _, stderr = checkout_with_python.setup()
    assert "up to date" in stderr
    assert checkout_with_python.calls.count("venv") == 1
    assert sum("--editable" in call for call in checkout_with_python.calls) == 2


def test_extras_add_up(checkout_with_python):
    checkout_with_python.setup(POWEROPD_EXTRAS="test")
    checkout_with_python.setup(POWEROPD_EXTRAS="lint")
    assert checkout_with_python.calls[-2].endswith("--editable .[lint,test]")
    calls = checkout_with_python.calls
    for extras in ("test,lint", "lint", ""):
        checkout_with_python.setup(POWEROPD_EXTRAS=extras)
    assert checkout_with_python.calls == calls


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_install_is_made_again(checkout_with_python, how):
    process = checkout_with_python.start(PIP_SECONDS="3" if how == signal.SIGKILL else "60")
    wait_for(lambda: any("--editable" in call for call in checkout_with_python.calls))
    process.send_signal(how)
    process.wait(timeout=10)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how)
    assert not (checkout_with_python.root / ".venv" / ".poweropd_stamp").exists()

    checkout_with_python.setup("--find", code=2)
    checkout_with_python.setup()
    calls = checkout_with_python.calls
    assert calls.count("venv") == 2
    if how == signal.SIGKILL:
        # The orphaned pip still wrote into the environment, so it had to be waited for.
        assert calls.index("pip ended", calls.index("pip ended") + 1) < len(calls) - 5


def test_concurrent_runs_install_once(checkout_with_python):
    runs = [checkout_with_python.start(PIP_SECONDS="1") for _ in range(3)]
    outputs = {run.communicate(timeout=30)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(outputs) == 1
    assert checkout_with_python.calls.count("venv") == 1


def test_a_failing_pip_shows_the_end_of_its_log(checkout_with_python):
    _, stderr = checkout_with_python.setup(code=1, PIP_EXIT="7")
    assert "pip says hello" in stderr
    assert str(checkout_with_python.root / ".venv" / "setup.log") in stderr


def test_a_folder_of_somebody_else_is_left_alone(checkout_with_python):
    precious = checkout_with_python.home / "precious"
    precious.mkdir()
    (precious / "thesis").touch()
    _, stderr = checkout_with_python.setup(code=2, POWEROPD_VENV=str(precious))
    assert "POWEROPD_VENV" in stderr
    assert [path.name for path in precious.iterdir()] == ["thesis"]


def test_the_index_of_the_user_reaches_pip(checkout_with_python):
    checkout_with_python.setup(POWEROPD_INDEX_URL="file:///some/index")
    installs = [call for call in checkout_with_python.calls if "pip install" in call]
    assert all("--index-url file:///some/index" in call for call in installs)


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_with_every_package_is_used_as_it_is(checkout, variable):
    stdout, _ = checkout.setup(**{variable: sys.prefix})
    assert stdout.splitlines() == [
        f"export POWEROPD_PYTHON={sys.prefix}/bin/python",
        "export PYTHONPATH=" + str(checkout.root).replace(" ", "\\ "),
    ]
    assert not (checkout.root / ".venv").exists()


def test_the_kernels_are_compiled_once_for_an_active_environment(checkout):
    _, stderr = checkout.setup(VIRTUAL_ENV=sys.prefix)
    assert "CPU kernels, said setup.py" in stderr
    checkout.setup(VIRTUAL_ENV=sys.prefix)
    assert checkout.calls == ["setup.py build_ext --inplace"]
    with (checkout.root / "csrc" / "numerics.h").open("a") as file:
        file.write("// changed")
    checkout.setup("--find", VIRTUAL_ENV=sys.prefix)
    assert len(checkout.calls) == 1
    checkout.setup(VIRTUAL_ENV=sys.prefix)
    assert len(checkout.calls) == 2


def test_kernels_that_do_not_compile_leave_plain_torch(checkout):
    stdout, stderr = checkout.setup(VIRTUAL_ENV=sys.prefix, BUILD_EXIT="1")
    assert "plain torch is used" in stderr
    assert str(checkout.root / "build" / "setup.log") in stderr
    assert stdout.startswith("export POWEROPD_PYTHON=")
    checkout.setup(VIRTUAL_ENV=sys.prefix)
    assert len(checkout.calls) == 2


def test_an_active_environment_that_lacks_a_package_is_not_used(checkout_with_python):
    pyproject = checkout_with_python.root / "pyproject.toml"
    text = pyproject.read_text().replace('"rich",', '"rich<1",\n"no-such-thing>=3",')
    pyproject.write_text(text)
    stdout, stderr = checkout_with_python.setup(VIRTUAL_ENV=sys.prefix)
    assert "no-such-thing>=3" in stderr
    assert "rich<1 (it has " in stderr
    assert ".venv/bin/python" in stdout


def test_a_chosen_python_that_lacks_packages_is_refused(checkout_with_python):
    chosen = str(checkout_with_python.bin / "python3.12")
    _, stderr = checkout_with_python.setup(code=2, POWEROPD_PYTHON=chosen)
    assert "POWEROPD_PYTHON" in stderr
    assert checkout_with_python.calls == []


def test_sourcing_sets_the_variables_and_leaves_the_shell_as_it_was(checkout_with_python):
    script = (
        'before=$-; source "$SCRIPT" 2>/dev/null; echo "$? $POWEROPD_PYTHON"; [[ $- == "$before" ]]'
    )
    for options in ("-c", "-euc"):
        result = subprocess.run(
            [shutil.which("bash"), options, script],
            env=checkout_with_python.environment
            | {"SCRIPT": str(checkout_with_python.root / "launch" / "setup_env.sh")},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"0 {checkout_with_python.root}/.venv/bin/python\n"


def test_a_failure_is_seen_by_a_shell_that_sources(checkout):
    script = 'source "$SCRIPT" 2>/dev/null || echo "failed with $?"'
    output = subprocess.check_output(
        [shutil.which("bash"), "-euc", script],
        env=checkout.environment | {"SCRIPT": str(checkout.root / "launch" / "setup_env.sh")},
        text=True,
        timeout=30,
    )
    assert output == "failed with 2\n"


def test_find_names_the_command_that_makes_the_environment(checkout_with_python):
    _, stderr = checkout_with_python.setup("--find", code=2)
    assert "launch/setup_env.sh" in stderr
    assert checkout_with_python.calls == []
    assert not os.path.exists(checkout_with_python.root / ".venv")
