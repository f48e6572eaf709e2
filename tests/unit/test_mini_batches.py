"""Several optimizer steps on a batch: each on its sequences, from the weights that it finds.

Shapes: B sequences, T tokens.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import made_trajectories, qwen3_folder
from support.exact_objective import exact_loss, exact_rewards, exact_weights
from support.plain_qwen3 import PlainQwen3
from support.run_settings import small_run
from test_policy_gradient_of_models import EOS, assert_close, by_hugging_face_name
from torch import Tensor

from poweropd_megatron.config.schema import ObjectiveConfig, OptimizerConfig
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.objectives.labels import Labels, label
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.ops import lm_head_tiles
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.student import Student
from poweropd_megatron.train.student_outcome import StudentOutcome

ADAM = OptimizerConfig(
    lr=0.01, min_lr=0.002, lr_decay_style="linear", clip_grad=0.0, adam_eps=0.1, weight_decay=0.1
)
STEPS = 10
"""Of the run, over which the learning rate decays."""
OBJECTIVES = {
    "token": ObjectiveConfig(
        kind="z_score", importance_ratio="token", ratio_low=0.8, ratio_high=1.2, terminal="raw"
    ),
    "sequence": ObjectiveConfig(
        kind="log_ratio", importance_ratio="sequence", ratio_low=0.5, terminal="raw"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    qwen3_folder.write(path, tie_word_embeddings=False, seed=3)
    return path


@pytest.fixture(scope="module")
def trajectories(folder: Path) -> Trajectories:
    """Return eight rows with the log-probs of the student as behaviour: on-policy at first."""
    rows = made_trajectories.random(8, vocab_size=qwen3_folder.SMALL["vocab_size"], eos=EOS)
    with torch.no_grad():
        logp_BT = _logp(PlainQwen3.from_folder(folder), rows, rows.token_ids_BT)
    rows.behaviour_logp_BT.copy_(torch.where(rows.response_mask_BT, logp_BT, 0.0))
    return rows


@pytest.fixture(scope="module")
def teacher_BT(trajectories: Trajectories) -> Tensor:
    shape = trajectories.token_ids_BT.shape
    return -5 * torch.rand(shape, generator=torch.Generator().manual_seed(4))


def _logp(model: PlainQwen3, rows: Trajectories, labels_BT: Tensor) -> Tensor:
    return model.logprobs(rows.token_ids_BT).gather(2, labels_BT[..., None])[..., 0]


def exact_steps(
    folder: Path,
    objective: ObjectiveConfig,
    rows: Trajectories,
    labels: Labels,
    teacher_BT: Tensor,
    size: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights after each part of the batch had its step of AdamW in fp64, and the
    log-probs that each was learned from."""
    model = PlainQwen3.from_folder(folder)
    adam = torch.optim.AdamW(
        [
            {"params": [w for w in model.weights.values() if w.dim() == 2]},
            {"params": [w for w in model.weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ],
        weight_decay=ADAM.weight_decay,
        betas=(ADAM.adam_beta1, ADAM.adam_beta2),
        eps=ADAM.adam_eps,
    )
    teacher_BT, mask_BT = teacher_BT.double(), labels.mask_BT
    with torch.no_grad():
        before_BT = _logp(model, rows, labels.student_BT)
    of_batch_N = exact_rewards(objective, teacher_BT[mask_BT], before_BT[mask_BT])
    parts = range(0, len(mask_BT), size)
    learned = []
    for number, start in enumerate(parts):
        part = slice(start, start + size)
        student_BT = _logp(model, rows, labels.student_BT)[part]
        weight_BT = exact_weights(
            objective,
            student_BT,
            rows.behaviour_logp_BT[part],
            mask_BT[part],
            mask_BT[part],
            [],
        )
        loss = exact_loss(
            objective, student_BT, teacher_BT[part], weight_BT, mask_BT[part], of_batch_N
        )
        adam.zero_grad()
        loss.backward()
        for group in adam.param_groups:
            share = number / (STEPS * len(parts))
            group["lr"] = (1 - share) * ADAM.lr + share * ADAM.min_lr
        adam.step()
        learned.append(torch.where(mask_BT[part], student_BT, 0.0).detach())
    return model.weights, torch.cat(learned)


def update(
    folder: Path,
    layout: Layout,
    objective: ObjectiveConfig,
    rows: Trajectories,
    labels: Labels,
    teacher_BT: Tensor,
    size: int | None,
) -> tuple[StudentOutcome, dict[str, Tensor]]:
    settings = small_run(
        folder, objective=objective, optimizer=ADAM, mini_batch_size=size, train_steps=STEPS
    )
    student = Student(settings, read_model_config(folder, setting="student.path"), layout)
    outcome = student.update(rows, labels, teacher_BT, build_reward(objective))
    return outcome, by_hugging_face_name(student, folder, lambda parameter: parameter.data)


@pytest.mark.parametrize("head", ["fused", "recompute", "materialized"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("level", OBJECTIVES)
def test_each_mini_batch_has_a_step_with_ratios_against_what_drew_it(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    layout: Layout,
    trajectories: Trajectories,
    teacher_BT: Tensor,
    level: str,
    size: int,
    head: str,
) -> None:
    """The fused head takes three tokens at a time."""
    bytes_of_three = {"cpu": 3 * 4 * qwen3_folder.SMALL["vocab_size"]}
    monkeypatch.setattr(lm_head_tiles, "CHUNK_BYTES", bytes_of_three)
    objective = replace(OBJECTIVES[level], head=head)
    labels = label(trajectories, objective.terminal, teacher_eos_id=EOS)
    batch = (objective, trajectories, labels, teacher_BT)
    weights, logp_BT = exact_steps(folder, *batch, size)
    outcome, found = update(folder, layout, *batch, size)
    start = PlainQwen3.from_folder(folder).weights
    assert_close(
        {name: found[name].double() - start[name] for name in found},
        {name: weights[name].detach() - start[name] for name in weights},
        relative=1e-4,
    )
    torch.testing.assert_close(outcome.logp_BT.double(), logp_BT, rtol=0, atol=1e-4)
    share = (8 // size - 1) / (STEPS * 8 // size)
    assert outcome.learning_rate == pytest.approx((1 - share) * ADAM.lr + share * ADAM.min_lr)
    assert outcome.weight_BT is not None
    ratios = outcome.weight_BT[labels.mask_BT]
    if size == 8:
        torch.testing.assert_close(ratios, torch.ones(len(ratios)), rtol=0, atol=1e-4)
    else:
        assert (ratios - 1).abs().max() > 0.02


def test_one_mini_batch_of_all_is_bitwise_the_update_without_the_setting(
    folder: Path, layout: Layout, trajectories: Trajectories, teacher_BT: Tensor
) -> None:
    objective = ObjectiveConfig(kind="power", alpha=1.0)
    labels = label(trajectories, "mask", teacher_eos_id=EOS)
    (one, ones), (other, others) = (
        update(folder, layout, objective, trajectories, labels, teacher_BT, size)
        for size in (None, 8)
    )
    assert one.grad_norm == other.grad_norm
    assert one.weight_BT is None
    assert torch.equal(one.logp_BT, other.logp_BT)
    assert all(torch.equal(ones[name], others[name]) for name in ones)
