"""Checkpoints and exports of a Qwen3-MoE: the same whatever ranks hold the experts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_rows import parallel, row
from safetensors.torch import load_file
from support.rank_pool import RankPool
from training import OPTIMIZER, Models, Row, build_models

from poweropd_megatron.checkpoint.export import export
from poweropd_megatron.checkpoint.run_state import RunState
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.schema import DType
from poweropd_megatron.data.prompts import Prompt, PromptStream
from poweropd_megatron.models.hf_folder import HFFolder

PROMPT = Prompt(text="1", token_ids=(1,), answer=None, source="none")
ONE = row("one-process", 1, parallel())
EP2 = row("EP2", 2, parallel(expert=2))
TP2_EP2 = row("TP2+SPxEP2", 2, parallel(2, expert=2, sequence=True))
TP2 = row("TP2+SP", 2, parallel(2, sequence=True))
PP2 = row("PP2", 2, parallel(1, 2))
EP2_DP2 = row("EP2xDP2", 4, parallel(expert=2))
EP2_BF16 = row("EP2-bf16", 2, parallel(expert=2))
EP2_PLAIN = row("EP2-plain", 2, parallel(expert=2), use_distributed_optimizer=False)
ONE_PLAIN = row("one-process-plain", 1, parallel(), use_distributed_optimizer=False)
EP2_PLAIN_BF16 = replace(EP2_PLAIN, name="EP2-plain-bf16")
ONE_PLAIN_BF16 = replace(ONE_PLAIN, name="one-process-plain-bf16")


def dtype_of(layout: Row) -> DType:
    return "bf16" if layout.name.endswith("bf16") else "fp32"


def state_of(models: Models, folder: Path) -> RunState:
    return RunState(
        models.student,
        models.student_model,
        PromptStream([PROMPT], seed=1, shuffle=False),
        CheckpointStore(folder / "checkpoints"),
    )


def update_and_save(layout: Row, student: str, teacher: str, folder: str, dtype: DType) -> None:
    """Update twice, save after the first, export after the second."""
    models = build_models(layout, student, teacher, dtype, OPTIMIZER)
    models.update(models.teacher.score(models.trajectories, models.labels))
    state_of(models, Path(folder)).save(1)
    finish(models, student, folder)


def resume(
    layout: Row, student: str, teacher: str, straight: str, folder: str, dtype: DType
) -> None:
    """Go on after the first update of another run."""
    models = build_models(layout, student, teacher, dtype, OPTIMIZER)
    assert state_of(models, Path(straight)).load_latest() == 1
    finish(models, student, folder)


def finish(models: Models, student: str, folder: str) -> None:
    models.update(models.teacher.score(models.trajectories, models.labels))
    export(models.student, models.student_model, reference=student, target=Path(folder) / "export")


def exported(folder: Path) -> dict[str, torch.Tensor]:
    source = HFFolder(folder / "export", setting="export")
    return {name: source.read(name) for name in source.names()}


@pytest.fixture(scope="module")
def straight(
    folders: dict[str, str], ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return the folders of runs of two updates by the name of their layout."""
    made = {}
    for layout in (ONE, EP2, TP2_EP2, EP2_BF16, EP2_PLAIN, ONE_PLAIN, ONE_PLAIN_BF16):
        made[layout.name] = tmp_path_factory.mktemp("run")
        ranks.run(
            update_and_save,
            layout,
            folders["student-experts"],
            folders["teacher-experts"],
            str(made[layout.name]),
            dtype_of(layout),
            world_size=layout.world_size,
        )
    return made


@pytest.mark.parametrize("name", ["EP2", "TP2+SPxEP2"])
def test_an_export_is_that_of_one_process_up_to_rounding(
    name: str, straight: dict[str, Path], folders: dict[str, str]
) -> None:
    first = load_file(Path(folders["student-experts"]) / "model.safetensors")
    expected, found = exported(straight["one-process"]), exported(straight[name])
    assert first.keys() == expected.keys() == found.keys()
    for tensor_name, tensor in expected.items():
        assert not torch.equal(tensor, first[tensor_name])
        torch.testing.assert_close(found[tensor_name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("saved", "layout"),
    [
        (ONE, ONE),
        (EP2, EP2),
        (TP2_EP2, TP2_EP2),
        (EP2_BF16, EP2_BF16),
        (EP2_PLAIN, EP2_PLAIN),
        (EP2_PLAIN, ONE_PLAIN),
        (ONE_PLAIN, EP2_PLAIN),
        (ONE_PLAIN_BF16, EP2_PLAIN_BF16),
        (EP2, ONE),
        (EP2, TP2_EP2),
        (EP2, PP2),
        (ONE, EP2),
        (ONE, TP2),
        (TP2_EP2, EP2_DP2),
    ],
    ids=lambda layout: layout.name,
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    saved: Row,
    layout: Row,
    straight: dict[str, Path],
    folders: dict[str, str],
    ranks: RankPool,
    tmp_path: Path,
) -> None:
    ranks.run(
        resume,
        layout,
        folders["student-experts"],
        folders["teacher-experts"],
        str(straight[saved.name]),
        str(tmp_path),
        dtype_of(layout),
        world_size=layout.world_size,
    )
    expected, found = exported(straight[saved.name]), exported(tmp_path)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        if saved == layout:
            assert torch.equal(found[name], tensor), name
        elif dtype_of(layout) == "bf16":
            torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-4)
        else:
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
