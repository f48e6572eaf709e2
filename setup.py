"""Builds the compiled kernels where this machine can; without them the package runs on plain torch.

POWEROPD_CUDA=auto|0|1   build the CUDA kernels: where nvcc and torch allow it, never, or fail
CUDA_HOME                the CUDA toolkit, where nvcc's own place doesn't tell
TORCH_CUDA_ARCH_LIST     GPU architectures; by default 8.0;9.0;10.0;12.0+PTX
CXX                      the C++ compiler

What was built, and why something was not, is written to build/extension.txt; earlier builds of what
is not built are removed, since they would be loaded.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CPU_SOURCES = [
    "csrc/cpu/module.cpp",
    "csrc/cpu/row_loops_avx512.cpp",
    "csrc/cpu/row_loops_avx2.cpp",
    "csrc/cpu/row_loops_portable.cpp",
]
CUDA_SOURCES = ["csrc/cuda/module.cpp", "csrc/cuda/launch.cu"]


def why_no_cpu_extension() -> str:
    """Return what this machine lacks for any compiled kernel; empty if it has all."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch can't be imported by this build: install torch first, and this project with "
            "pip's --no-build-isolation"
        )
    command = os.environ.get("CXX", "c++")
    try:
        compiler = (shlex.split(command) or [""])[0]
    except ValueError:
        compiler = ""
    if not compiler:
        return f"CXX={command} names no compiler: set it to a command such as g++, or unset it"
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) is on PATH: install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
    return ""


def why_no_cuda_extension() -> str:
    """Return what this machine lacks for the CUDA kernels; empty if it has all."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    home = find_cuda_home()
    if home is None:
        return "no CUDA toolkit was found: put nvcc on PATH, or set CUDA_HOME"
    os.environ["CUDA_HOME"] = str(home)
    printed = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    version = re.search(r"release (\d+)\.", printed.stdout)
    if version is None:
        return f"{home}/bin/nvcc doesn't run: {printed.stderr.strip()}"
    if version[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc of CUDA {version[1]} doesn't fit a torch built with {torch.version.cuda}"
    return ""


def find_cuda_home() -> Path | None:
    """Return the folder of a whole CUDA toolkit; an nvcc on PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    candidates += ["/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def extensions() -> tuple[list, dict]:
    """Return setuptools' ext_modules and cmdclass, after noting what is built."""
    choice = os.environ.get("POWEROPD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"setup.py: POWEROPD_CUDA={choice}: expected auto, 0 or 1")
    reason = why_no_cpu_extension()
    if reason:
        if choice == "1":
            sys.exit(f"setup.py: POWEROPD_CUDA=1, but {reason}")
        note(f"no compiled kernels: {reason}")
        # Without modules to build, only build_py is sure to run.
        return [], {
            "build_ext": removing("_cpu", "_cuda", before=build_ext),
            "build_py": removing("_cpu", "_cuda", before=build_py),
        }
    # ninja, where it is installed, compiles files side by side.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    reason = "POWEROPD_CUDA=0" if choice == "0" else why_no_cuda_extension()
    if reason and choice == "1":
        sys.exit(f"setup.py: POWEROPD_CUDA=1, but {reason}")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    include_dirs = [str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda")]
    cxx = ["-O3", "-g0", "-std=c++20"]
    modules = [
        CppExtension(
            "poweropd_megatron.ops._cpu",
            CPU_SOURCES,
            include_dirs=include_dirs,
            extra_compile_args=[*cxx, "-fopenmp"],
            extra_link_args=["-fopenmp", "-s"],
        )
    ]
    if not reason:
        modules.append(
            CUDAExtension(
                "poweropd_megatron.ops._cuda",
                CUDA_SOURCES,
                include_dirs=[*include_dirs, *packaged_cuda_headers()],
                extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++17", "--threads=2"]},
                extra_link_args=["-s"],
            )
        )
    if choice != "1":
        for module in modules:
            module.optional = True
    command = build_command(reason)
    return modules, {"build_ext": removing("_cuda", before=command) if reason else command}


def build_command(why_no_cuda: str) -> type:
    """Return the command that builds what it can, and notes what that was.

    An optional module that doesn't compile is left out, with its old build.
    """
    from torch.utils.cpp_extension import BuildExtension

    class KernelBuild(BuildExtension):
        failures: dict[str, str]

        def __init__(self, *args, **kwargs):
            super().__init__(*args, use_ninja=has_ninja(), **kwargs)

        def run(self):
            self.failures = {}
            note("the kernels are being compiled")
            try:
                super().run()
            except Exception as error:
                # torch tries the compiler before it builds anything.
                if not all(module.optional for module in self.extensions):
                    raise
                for module in self.extensions:
                    self.leave_out(module, error)
            parts = []
            for title, name in (("CPU", "_cpu"), ("CUDA", "_cuda")):
                failure = self.failures.get(name)
                if title == "CUDA" and why_no_cuda:
                    failure = why_no_cuda
                parts.append(f"no {title} kernels: {failure}" if failure else f"{title} kernels")
            note("; ".join(parts))

        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                self.leave_out(ext, error)

        def leave_out(self, ext, error):
            name = ext.name.rpartition(".")[2]
            remove_builds(name)
            first_line = str(error).strip().partition("\n")[0]
            self.failures[name] = f"they didn't compile ({first_line})"

    return KernelBuild


def removing(*names: str, before: type) -> type:
    """Return a setuptools command that removes all builds of these modules before it runs."""

    class RemovingCommand(before):
        def run(self):
            for name in names:
                remove_builds(name)
            super().run()

    return RemovingCommand


def remove_builds(name: str) -> None:
    """Remove what earlier builds left of a module, beside its sources and for wheels."""
    for folder in (ROOT, *ROOT.glob("build/lib*")):
        for path in (folder / "poweropd_megatron" / "ops").glob(f"{name}.*so"):
            path.unlink()


def packaged_cuda_headers() -> list[str]:
    """Return the header folders of torch's CUDA packages; a bare nvcc lacks some of these."""
    try:
        import nvidia
    except ImportError:
        return []
    folders = [Path(part) / "cu13" / "include" for part in nvidia.__path__]
    return [str(folder) for folder in folders if folder.is_dir()]


def has_ninja() -> bool:
    """Return True where ninja runs; without it files are compiled one by one."""
    from torch.utils.cpp_extension import is_ninja_available

    return is_ninja_available()


def note(text: str) -> None:
    """Say what is built, also to launch/setup_env.sh."""
    print(f"setup.py: {text}", file=sys.stderr)
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "extension.txt").write_text(text + "\n")


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
