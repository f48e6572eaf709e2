"""The CPU as megatron.core's device: what install() reaches, and what it leaves alone.

install() changes a process for good, so each situation is observed in a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from poweropd_megatron.errors import ConfigError
from poweropd_megatron.parallel import cpu_device

SNAPSHOT = """
import importlib, json, sys, types
import torch
from poweropd_megatron.parallel import cpu_device

def snapshot():
    places = {"torch": torch, "cuda": torch.cuda, "distributed": torch.distributed,
              "Tensor": torch.Tensor, "Parameter": torch.nn.Parameter}
    return {(place, name): id(value) for place, owner in places.items()
            for name, value in vars(owner).items()}

def changes(before):
    after = snapshot()
    return sorted(f"{place}.{name}" for place, name in before.keys() | after.keys()
                  if before.get((place, name)) != after.get((place, name)))

def megatron_modules():
    return {name: module for name, module in sys.modules.items()
            if name.startswith("megatron.core")
            and getattr(vars(module).get("torch"), "__name__", "") == "torch"}

def attempt(call):
    try:
        return str(call())
    except Exception as error:
        return type(error).__name__

library = types.ModuleType("library_like_transformers")
exec('''
import torch
def rotary_frequencies(device=None):
    return 10000.0 ** (-torch.arange(4, device=device) / 4)
def kind(tensor):
    return tensor.type()
def move(tensor):
    return tensor.cuda()
''', vars(library))
"""

WITH_CUDA = (
    SNAPSHOT
    + """
for part in cpu_device._PARTS:
    importlib.import_module(part)
torch.cuda.is_available = lambda: True
before = snapshot()
installed = cpu_device.install()
print(json.dumps({
    "installed": installed,
    "changes": changes(before),
    "real torch everywhere": all(m.torch is torch for m in megatron_modules().values()),
    "modules": len(megatron_modules()),
}))
"""
)

WITHOUT_CUDA = (
    SNAPSHOT
    + """
for part in sys.argv[1:]:
    importlib.import_module(part)
errors_before = [attempt(lambda: torch.zeros(1, device="cuda")),
                 attempt(lambda: torch.ones(1).cuda()), attempt(torch.cuda.current_device),
                 attempt(lambda: library.move(torch.ones(1)))]
before = snapshot()
seed_before = torch.initial_seed()
installed = cpu_device.install()
first = changes(before)

def in_megatron(code, module="megatron.core.optimizer.optimizer"):
    return eval(code, vars(sys.modules[module]))

in_megatron("torch.cuda.manual_seed(99)")
stand_in = in_megatron("torch")
methods = (torch.Tensor.cuda, torch.Tensor.type)
late_name = "megatron.core.optimizer.qk_clip"
was_loaded = late_name in sys.modules
late = importlib.import_module(late_name)
real_at_first = late.torch is torch
again = cpu_device.install()
tensor = torch.ones(2)
print(json.dumps({
    "installed": installed,
    "changes": first,
    "bound": all(m.torch is stand_in for m in megatron_modules().values()),
    "modules": len(megatron_modules()),
    "late": [was_loaded, real_at_first, late.torch is stand_in],
    "again": [again, (torch.Tensor.cuda, torch.Tensor.type) == methods],
    "changes after all": changes(before),
    "seed kept": torch.initial_seed() == seed_before,
    "errors before": errors_before,
    "errors": [attempt(lambda: torch.zeros(1, device="cuda")), attempt(tensor.cuda),
               attempt(torch.cuda.current_device), attempt(lambda: library.move(tensor))],
    "library": {
        "torch": library.torch is torch,
        "frequencies": library.rotary_frequencies().tolist(),
        "meta": str(library.rotary_frequencies(torch.device("meta")).device),
        "kind": library.kind(tensor),
        "converted": str(tensor.type(torch.float64).dtype),
    },
    "user's kinds": [tensor.type(), tensor.bfloat16().type(), torch.nn.Parameter(tensor).type()],
    "megatron's kinds": [
        in_megatron(code) for code in ("torch.ones(2).type()", "torch.ones(2).bfloat16().type()",
                                       "torch.nn.Parameter(torch.ones(2)).type()")
    ],
    "megatron's tensors": [in_megatron(code) for code in (
        "str(torch.zeros([2, 3], dtype=torch.int, device='cuda').device)",
        "str(torch.tensor([1.5], device='cuda').device)",
        "str(torch.zeros(2, device=torch.cuda.current_device()).device)",
        "str(torch.zeros(2, device='meta').device)",
        "str(torch.ones(2).cuda().device)",
        "torch.zeros([2], dtype=torch.int, device='cuda').tolist()",
        "torch.tensor([1.5, 2], device='cuda').tolist()",
    )],
    "megatron's torch": [in_megatron(code) for code in (
        "torch.cuda.is_available()", "torch.cuda.synchronize()", "torch.__name__",
        "torch.cuda.__name__", "torch.Tensor is __import__('torch').Tensor",
        "torch.distributed.all_reduce is __import__('torch').distributed.all_reduce",
        "torch.cuda.Stream().record_event().synchronize()",
    )],
    "megatron's random state": in_megatron(
        "[torch.cuda.manual_seed(n).initial_seed() and torch.cuda.get_rng_state().tolist()"
        " == torch.cuda.random.get_rng_state(device='cuda').tolist() for n in (3, 4)]"
    ),
}))
"""
)


def observe(script: str, *args: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    observed: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return observed


@pytest.fixture(scope="module")
def with_cuda() -> dict[str, Any]:
    return observe(WITH_CUDA)


@pytest.fixture(scope="module")
def imported_before() -> dict[str, Any]:
    return observe(WITHOUT_CUDA, *cpu_device._PARTS)


@pytest.fixture(scope="module")
def imported_by_install() -> dict[str, Any]:
    return observe(WITHOUT_CUDA)


@pytest.fixture(params=["imported_before", "imported_by_install"])
def without_cuda(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return what is seen where Megatron was imported before install(), and where it wasn't."""
    observed: dict[str, Any] = request.getfixturevalue(request.param)
    return observed


def test_nothing_changes_where_cuda_is_available(with_cuda: dict[str, Any]) -> None:
    assert with_cuda["installed"] is False
    assert with_cuda["changes"] == []
    assert with_cuda["real torch everywhere"]
    assert with_cuda["modules"] > 50


def test_two_tensor_methods_change_and_nothing_else_of_torch(
    imported_before: dict[str, Any],
) -> None:
    """Not torch.zeros and the like, not torch.cuda, not torch.distributed, not Parameter."""
    assert imported_before["installed"] is True
    assert imported_before["changes"] == ["Tensor.cuda", "Tensor.type"]
    assert imported_before["changes after all"] == imported_before["changes"]


def test_every_module_of_megatron_gets_the_stand_in(without_cuda: dict[str, Any]) -> None:
    assert without_cuda["bound"]
    assert without_cuda["modules"] > 50


def test_a_second_install_is_harmless_and_reaches_modules_imported_since(
    without_cuda: dict[str, Any],
) -> None:
    assert without_cuda["late"] == [False, True, True]
    assert without_cuda["again"] == [True, True]


def test_asking_for_cuda_fails_outside_megatron_as_before(without_cuda: dict[str, Any]) -> None:
    assert without_cuda["errors"] == without_cuda["errors before"]
    assert all(error.endswith(("Error", "Exception")) for error in without_cuda["errors"])


def test_other_libraries_see_the_real_torch(without_cuda: dict[str, Any]) -> None:
    library = without_cuda["library"]
    assert library["torch"]
    assert library["frequencies"] == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert library["meta"] == "meta"
    assert library["kind"] == "torch.FloatTensor"
    assert library["converted"] == "torch.float64"


def test_a_tensor_has_its_cpu_name_for_users_and_a_cuda_name_for_megatron(
    without_cuda: dict[str, Any],
) -> None:
    kinds = ["FloatTensor", "BFloat16Tensor", "FloatTensor"]
    assert without_cuda["user's kinds"] == [f"torch.{kind}" for kind in kinds]
    assert without_cuda["megatron's kinds"] == [f"torch.cuda.{kind}" for kind in kinds]


def test_megatron_gets_cpu_tensors_where_it_asks_for_cuda(without_cuda: dict[str, Any]) -> None:
    assert without_cuda["megatron's tensors"] == [
        "cpu", "cpu", "cpu", "meta", "cpu", [0, 0], [1.5, 2.0]
    ]  # fmt: skip
    assert without_cuda["megatron's torch"] == [
        False, None, "torch", "torch.cuda", True, True, None
    ]  # fmt: skip


def test_megatrons_random_states_do_not_seed_the_users(without_cuda: dict[str, Any]) -> None:
    assert without_cuda["seed kept"]
    assert without_cuda["megatron's random state"] == [True, True]


def test_packages_that_need_cuda_are_refused_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron, which takes them wherever they can be imported, would end in a driver's error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu_device.install()
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    with pytest.raises(ConfigError, match="Transformer Engine or Apex is installed"):
        cpu_device.install()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_device.install() is False
