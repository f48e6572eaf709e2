"""Each sampled objective's gradient on a real model, in each head, against fp64 autograd.

Shapes: B sequences, T tokens, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from support import made_trajectories, qwen3_folder
from support.exact_objective import exact_loss, exact_rewards, exact_weights
from support.plain_qwen3 import PlainQwen3
from support.run_settings import small_run
from test_policy_gradient_of_models import (
    EOS,
    TEACHER_EOS,
    UNCLIPPED,
    assert_close,
    gradients,
    norm,
)
from torch import Tensor

from poweropd_megatron.config.objective import KINDS, ObjectiveConfig
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.objectives.labels import Labels, label
from poweropd_megatron.objectives.rewards import build_reward
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.student import Student

MICRO_BATCH = 2
SAMPLED = [kind for kind, known in KINDS.items() if known.family == "sampled"]
KIND_CASES = [{"kind": kind} for kind in SAMPLED] + [
    {"kind": "power", "alpha": 0.01},
    {"kind": "power", "alpha": 500.0},
    {"kind": "constant_negative", "low_probability": 0.04},
]
CASES = [
    {"kind": "log_ratio", "reward_normalization": "sign_max_abs"},
    {"kind": "power", "alpha": 1.0, "reward_normalization": "z_score"},
    {"kind": "power", "alpha": 1.0, "loss_normalization": "sequence_mean"},
    {"kind": "power", "alpha": 1.0, "loss_normalization": "micro_batch_mean"},
    {"kind": "z_score", "loss_normalization": "sequence_mean", "terminal": "im_end"},
    *(
        {"kind": "log_ratio", "terminal": terminal, "importance_ratio": level, "ratio_low": 0.7}
        for terminal in ("mask", "im_end")
        for level in ("token", "sequence")
    ),
    {
        "kind": "z_score",
        "importance_ratio": "sequence",
        "ratio_high": 1.3,
        "loss_normalization": "sequence_mean",
        "window_first_percent": 60.0,
        "window_after_tokens": 1,
    },
]
HEADS = ("fused", "recompute", "materialized")


def names(case: dict[str, object]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    qwen3_folder.write(path, tie_word_embeddings=True, seed=3)
    return path


@pytest.fixture(scope="module")
def trajectories(folder: Path) -> Trajectories:
    """Return ragged rows with behaviour log-probs near the student's, some beyond any bound."""
    made = made_trajectories.random(8, vocab_size=qwen3_folder.SMALL["vocab_size"], eos=EOS)
    with torch.no_grad():
        logp_BTV = PlainQwen3.from_folder(folder).logprobs(made.token_ids_BT)
    logp_BT = logp_BTV.gather(2, made.token_ids_BT[..., None])[..., 0].float()
    noise_BT = 0.3 * torch.randn(logp_BT.shape, generator=torch.Generator().manual_seed(7))
    in_response_BT = made.response_mask_BT
    made.behaviour_logp_BT[in_response_BT] = (logp_BT + noise_BT)[in_response_BT]
    return made


@pytest.fixture(scope="module")
def teacher_logp_BT(trajectories: Trajectories) -> Tensor:
    shape = trajectories.token_ids_BT.shape
    return -5 * torch.rand(shape, generator=torch.Generator().manual_seed(4))


def labels_of(trajectories: Trajectories, objective: ObjectiveConfig) -> Labels:
    return label(
        trajectories,
        objective.terminal,
        teacher_eos_id=TEACHER_EOS,
        first_percent=objective.window_first_percent,
        after_tokens=objective.window_after_tokens,
    )


def exact_gradients(
    folder: Path, objective: ObjectiveConfig, trajectories: Trajectories, teacher_BT: Tensor
) -> dict[str, Tensor]:
    model = PlainQwen3.from_folder(folder)
    labels = labels_of(trajectories, objective)
    logp_BTV = model.logprobs(trajectories.token_ids_BT)
    student_BT = logp_BTV.gather(2, labels.student_BT[..., None])[..., 0]
    mask_BT = labels.mask_BT
    weight_BT = exact_weights(
        objective,
        student_BT,
        trajectories.behaviour_logp_BT,
        mask_BT,
        mask_BT & (labels.student_BT == trajectories.token_ids_BT),
        by_length(trajectories),
    )
    teacher_BT = teacher_BT.double()
    rewards_N = exact_rewards(objective, teacher_BT[mask_BT], student_BT[mask_BT])
    loss = exact_loss(objective, student_BT, teacher_BT, weight_BT, mask_BT, rewards_N)
    found = torch.autograd.grad(loss, list(model.weights.values()))
    return dict(zip(model.weights, found, strict=True))


def by_length(trajectories: Trajectories) -> list[list[int]]:
    """Return the rows of each micro-batch: those of like length go together, the longest first."""
    lengths = trajectories.total_lengths_B.tolist()
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[start : start + MICRO_BATCH] for start in range(0, len(rows), MICRO_BATCH)]


def update(
    folder: Path,
    layout: Layout,
    objective: ObjectiveConfig,
    trajectories: Trajectories,
    teacher_BT: Tensor,
) -> tuple[dict[str, Tensor], float]:
    """Return the gradients of one update, and their norm as the outcome tells it."""
    settings = small_run(
        folder, objective=objective, optimizer=UNCLIPPED, micro_batch_size=MICRO_BATCH
    )
    student = Student(settings, read_model_config(folder, setting="student.path"), layout)
    outcome = student.update(
        trajectories, labels_of(trajectories, objective), teacher_BT, build_reward(objective)
    )
    return gradients(student, folder), outcome.grad_norm


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", CASES, ids=names)
def test_every_setting_of_the_objective_gives_the_exact_gradient_in_every_head(
    folder: Path,
    layout: Layout,
    trajectories: Trajectories,
    teacher_logp_BT: Tensor,
    case: dict[str, object],
    head: str,
) -> None:
    objective = ObjectiveConfig(**case, head=head)
    expected = exact_gradients(folder, objective, trajectories, teacher_logp_BT)
    found, grad_norm = update(folder, layout, objective, trajectories, teacher_logp_BT)
    assert_close(found, expected, relative=1e-5)
    assert grad_norm == pytest.approx(norm(expected), rel=1e-5)


@pytest.mark.parametrize("case", KIND_CASES, ids=names)
def test_every_kind_of_reward_gives_the_exact_gradient(
    folder: Path,
    layout: Layout,
    trajectories: Trajectories,
    teacher_logp_BT: Tensor,
    case: dict[str, object],
) -> None:
    objective = ObjectiveConfig(**case)
    expected = exact_gradients(folder, objective, trajectories, teacher_logp_BT)
    found, _ = update(folder, layout, objective, trajectories, teacher_logp_BT)
    assert norm(expected) > 0
    assert_close(found, expected, relative=1e-5)


def test_the_cases_reach_both_bounds_of_the_ratio_and_leave_some_tokens_alone(
    folder: Path, trajectories: Trajectories
) -> None:
    with torch.no_grad():
        logp_BTV = PlainQwen3.from_folder(folder).logprobs(trajectories.token_ids_BT)
    logp_BT = logp_BTV.gather(2, trajectories.token_ids_BT[..., None])[..., 0]
    difference_BT = logp_BT - trajectories.behaviour_logp_BT
    of_tokens = difference_BT[trajectories.response_mask_BT].exp()
    assert of_tokens.min() < 0.7 < of_tokens.median() < 2
    of_sequences = torch.where(trajectories.response_mask_BT, difference_BT, 0.0).sum(1).exp()
    assert of_sequences.min() < 0.7
    assert of_sequences.max() > 2
