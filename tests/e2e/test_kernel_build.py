"""setup.py in a copy of the checkout: what it builds, and what it says where it can't."""

import os
import shutil
import subprocess
import sys
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


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
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
