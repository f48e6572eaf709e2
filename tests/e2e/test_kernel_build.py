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
    (tmp_path / "poweropd_megatron").mkdir()
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


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_cuda_kernels_can_be_declined(copy: Path) -> None:
    """There are no sources here: compiling fails after the choice was made."""
    build(copy, POWEROPD_CUDA="0")
    said = (copy / "build" / "extension.txt").read_text()
    assert said == "CPU kernels; no CUDA kernels: POWEROPD_CUDA=0\n"
