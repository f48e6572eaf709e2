"""setup.py in a copy of the checkout: what it builds, and what it says where it can't."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with the project's build files and no sources of kernels."""
    (tmp_path / "poweropd_megatron" / "ops").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    shutil.copy(REPO / "poweropd_megatron" / "__init__.py", tmp_path / "poweropd_megatron")
    return tmp_path


def build(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "CXX"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_compiler_the_package_is_installed_without_kernels(copy: Path) -> None:
    built = build(copy, PATH=str(copy / "empty"))
    assert built.returncode == 0, built.stderr
    said = "no compiled kernels: no C++ compiler (c++) is on PATH: install g++, or set CXX"
    assert f"setup.py: {said}" in built.stderr
    assert (copy / "build" / "extension.txt").read_text() == said + "\n"
    assert not list(copy.glob("poweropd_megatron/**/*.so"))


def test_a_compiler_that_is_named_and_missing_is_told(copy: Path) -> None:
    assert "no C++ compiler (no-such-c++) is on PATH" in build(copy, CXX="no-such-c++ -x").stderr


@pytest.mark.parametrize("command", ["", " ", '"g++'])
def test_a_variable_that_names_no_compiler_is_told(command: str, copy: Path) -> None:
    built = build(copy, CXX=command)
    assert built.returncode == 0, built.stderr
    assert f"CXX={command} names no compiler: set it to a command such as g++" in said_by(copy)
    assert "Traceback" not in built.stderr
    refused = build(copy, CXX=command, POWEROPD_CUDA="1")
    assert refused.returncode == 1
    assert f"setup.py: POWEROPD_CUDA=1, but CXX={command} names no compiler" in refused.stderr


def old_builds(folder: Path) -> dict[str, list[Path]]:
    """Return made-up builds of each module: beside the sources, and for a wheel."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    builds = {}
    for name in ("_cpu", "_cuda"):
        places = (folder, folder / "build" / "lib.linux-x86_64-cpython-312")
        builds[name] = [place / "poweropd_megatron" / "ops" / f"{name}{suffix}" for place in places]
        for path in builds[name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return builds


@pytest.mark.parametrize("command", [["build_ext", "--inplace"], ["build"]])
def test_old_builds_are_removed_where_nothing_is_built(command: list[str], copy: Path) -> None:
    builds = old_builds(copy)
    assert build(copy, *command, CXX="no-such-c++").returncode == 0
    assert not any(path.exists() for path in (*builds["_cpu"], *builds["_cuda"]))


def test_old_builds_of_the_cuda_kernels_alone_are_removed_where_they_are_not_built(
    copy: Path,
) -> None:
    builds = old_builds(copy)
    (copy / "csrc" / "cpu").mkdir(parents=True)
    for name in ("module", "row_loops_avx512", "row_loops_avx2", "row_loops_portable"):
        (copy / "csrc" / "cpu" / f"{name}.cpp").touch()
    assert build(copy, POWEROPD_CUDA="0").returncode == 0
    assert said_by(copy) == "CPU kernels; no CUDA kernels: POWEROPD_CUDA=0\n"
    assert builds["_cpu"][0].stat().st_size > 0
    assert not any(path.exists() for path in builds["_cuda"])


def test_other_commands_leave_the_builds_alone(copy: Path) -> None:
    builds = old_builds(copy)
    assert build(copy, "--version", CXX="no-such-c++").returncode == 0
    assert all(path.exists() for path in (*builds["_cpu"], *builds["_cuda"]))


def test_a_source_distribution_has_all_that_the_kernels_are_built_from(copy: Path) -> None:
    shutil.copytree(REPO / "csrc", copy / "csrc")
    shutil.copy(REPO / "MANIFEST.in", copy)
    built = build(copy, "sdist")
    assert built.returncode == 0, built.stderr
    [archive] = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(copy)) for path in copy.glob("csrc/**/*.*")}
    assert "csrc/cuda/row_kernels.cuh" in sources
    assert sources <= packed


def test_cuda_kernels_that_are_demanded_and_impossible_end_the_build(copy: Path) -> None:
    built = build(copy, PATH=str(copy / "empty"), POWEROPD_CUDA="1")
    assert built.returncode == 1
    assert "setup.py: POWEROPD_CUDA=1, but no C++ compiler" in built.stderr


def test_an_unknown_choice_about_cuda_is_refused(copy: Path) -> None:
    built = build(copy, POWEROPD_CUDA="yes")
    assert built.returncode == 1
    assert "setup.py: POWEROPD_CUDA=yes: expected auto, 0 or 1" in built.stderr


def said_by(folder: Path) -> str:
    return (folder / "build" / "extension.txt").read_text()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_what_does_not_compile_is_left_out_and_said(copy: Path) -> None:
    """There are no sources here."""
    built = build(copy, POWEROPD_CUDA="0")
    assert built.returncode == 0, built.stderr
    assert said_by(copy).startswith("no CPU kernels: they didn't compile (")
    assert said_by(copy).endswith("; no CUDA kernels: POWEROPD_CUDA=0\n")


def test_a_compiler_that_does_not_work_leaves_plain_torch(copy: Path) -> None:
    built = build(copy, CXX="false", POWEROPD_CUDA="0")
    assert built.returncode == 0, built.stderr
    assert said_by(copy).startswith("no CPU kernels: they didn't compile (")


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_an_nvcc_that_refuses_the_compiler_costs_the_cuda_kernels_alone(copy: Path) -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("torch is a build without CUDA")
    home = copy / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\n[ $# = 1 ] && echo release {torch.version.cuda}, && exit 0\n"
        "echo unsupported compiler >&2; exit 1\n"
    )
    nvcc.chmod(0o755)
    shutil.copytree(REPO / "csrc", copy / "csrc")
    built = build(copy, CUDA_HOME=str(home), CXXFLAGS="-O0")
    assert built.returncode == 0, built.stderr
    assert said_by(copy).startswith("CPU kernels; no CUDA kernels: they didn't compile (")
    assert len(list(copy.glob("**/ops/_cpu*.so"))) >= 1
    assert not list(copy.glob("**/ops/_cuda*.so"))
