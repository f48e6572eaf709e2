"""What ptxas makes of the CUDA kernels: no spills, and 16-byte loads that fly together."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from support import ptx_backend
from support.ptx_backend import CSRC

REASON = ptx_backend.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
ARCHITECTURES = (80, 90, 100, 120)
NUM_KERNELS = 42
ROUND = 4
"""kUnroll of the kernels."""
FITTING = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def find_disassembler() -> str | None:
    """Return nvdisasm's path: beside nvcc, on PATH, or of the package nvidia-cuda-nvdisasm."""
    package = find_spec("nvidia")
    parts = package.submodule_search_locations if package else None
    folders = [Path(folder, "cu13", "bin") for folder in parts or []]
    if nvcc := shutil.which("nvcc"):
        folders.insert(0, Path(nvcc).resolve().parent)
    beside = (shutil.which("nvdisasm", path=folder) for folder in folders)
    return next(filter(None, [*beside, shutil.which("nvdisasm")]), None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def cubin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the kernels for an architecture; ptxas's report lies beside them."""
    cubin = tmp_path_factory.mktemp("sass") / f"sm_{request.param}.cubin"
    options = [f"-arch=sm_{request.param}", "-O3", "-std=c++17", "-Xptxas", "-v"]
    include = [f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    source = str(CSRC / "cuda" / "launch.cu")
    result = subprocess.run(
        ["nvcc", "-cubin", *options, *include, source, "-o", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    )
    cubin.with_suffix(".txt").write_text(result.stderr)
    return cubin


@pytest.fixture(scope="module")
def instructions(cubin: Path) -> dict[str, list[str]]:
    """Return each kernel's opcodes."""
    disassembler = find_disassembler()
    if not disassembler:
        pytest.skip("no nvdisasm beside nvcc, on PATH or of the package nvidia-cuda-nvdisasm")
    sass = subprocess.check_output([disassembler, str(cubin)], text=True)
    _, *parts = re.split(r"^\.text\.(\S+):$", sass, flags=re.MULTILINE)
    opcode = re.compile(r"/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)")
    return {name: opcode.findall(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def test_no_kernel_has_a_stack_or_spills(cubin: Path) -> None:
    report = cubin.with_suffix(".txt").read_text()
    assert report.count("bytes stack frame") == report.count(FITTING) == NUM_KERNELS


def test_no_kernel_uses_local_memory(instructions: dict[str, list[str]]) -> None:
    assert len(instructions) == NUM_KERNELS
    for name, opcodes in instructions.items():
        local = [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))]
        assert not local, name


def test_logits_are_loaded_and_stored_in_16_bytes(instructions: dict[str, list[str]]) -> None:
    for name, opcodes in instructions.items():
        wide = [opcode for opcode in opcodes if "128" in opcode.split(".")]
        loads = sum(opcode.startswith("LDG.E.EF") for opcode in wide)
        stores = sum(opcode.startswith("STG.E.EF") for opcode in wide)
        if "row_stats" in name:
            assert (loads, stores) == (ROUND + 1, 0), name
        if "row_grad" in name:
            assert loads == ROUND + 2, name
            assert stores >= ROUND + 2, name


def test_loads_are_in_flight_together(cubin: Path, instructions: dict[str, list[str]]) -> None:
    """No exponential stands between those of a round on sm_90, or between two of them on others."""
    together = ROUND if cubin.stem == "sm_90" else 2
    for name, opcodes in instructions.items():
        if "row_" not in name:
            continue
        kinds = "".join(
            "L" if opcode.startswith("LDG.E.EF") else "X" if opcode == "MUFU.EX2" else ""
            for opcode in opcodes
        )
        assert "L" * together in kinds, name
