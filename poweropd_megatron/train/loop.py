"""The algorithm: generate, score, update; evaluate and save when it is time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from poweropd_megatron.checkpoint.run_state import RunState
from poweropd_megatron.checkpoint.store import CheckpointStore
from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.data.prompts import PromptStream
from poweropd_megatron.evaluation.evaluator import Evaluation, Evaluator
from poweropd_megatron.objectives.gradient_variance import PromptSigns
from poweropd_megatron.objectives.labels import Labels, label
from poweropd_megatron.objectives.rewards import BatchReward, Reward
from poweropd_megatron.rollout.engine import RolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.clock import Clock
from poweropd_megatron.train.recorder import Recorder
from poweropd_megatron.train.step_metrics import (
    padding_metrics,
    speed_metrics,
    step_diagnostics,
    step_metrics,
)
from poweropd_megatron.train.student import Student
from poweropd_megatron.train.teacher import OwnScores, Teacher
from poweropd_megatron.train.teacher_hidden import Handed, OwnHidden

TRAIN_STREAM = 0
"""First number of the random streams of training rollouts."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, built and ready."""

    config: TrainConfig
    prompts: PromptStream
    rollout: RolloutEngine
    sampling: Sampling
    student: Student
    teacher: Teacher
    teacher_eos_id: int
    reward: Reward | BatchReward
    evaluator: Evaluator
    state: RunState
    checkpoints: CheckpointStore
    recorder: Recorder


def train(run: Run, *, first_step: int) -> None:
    """Run the steps from first_step to train_steps. Called by all ranks."""
    config, clock = run.config, Clock()
    for step in range(first_step, config.train_steps + 1):
        trajectories, scores = _generate_and_score(run, step, clock)
        with clock.phase("teacher"):
            labels = _label(run, trajectories)
            teacher = _share_scores(run, trajectories, labels, scores)
        with clock.phase("student"):
            run.recorder.phase("student")
            outcome = run.student.update(
                trajectories, labels, teacher, run.reward, signs=_signs(run, step)
            )

        facts = (trajectories, labels, outcome.teacher_logp_BT, outcome)
        batchings = {"student": run.student.batching, "teacher": run.teacher.batching}
        lengths_B = trajectories.total_lengths_B.tolist()
        run.recorder.tell_of_oversized(step, batchings, lengths_B)
        evaluation = None
        if _is_due(step, config.eval.interval, config.train_steps):
            with clock.phase("eval"):
                evaluation = evaluate(run, step)
        run.recorder.step(
            step,
            step_metrics(*facts, ratio=run.student.ratio)
            | padding_metrics(batchings, lengths_B, num_parts=config.rollout.num_parts)
            | speed_metrics(clock.read(), trajectories)
            | run.teacher.read_cost(),
            diagnostics=step_diagnostics(*facts)
            if _is_due(step, config.telemetry.diagnostics_interval, config.train_steps)
            else None,
            evaluation=evaluation,
        )
        if _is_due(step, config.checkpoint.interval, config.train_steps):
            with clock.phase("checkpoint"):
                save(run, step)


def evaluate(run: Run, step: int) -> Evaluation | None:
    """Return the evaluation of the weights after `step`; None without evaluation prompts."""
    if not run.config.data.eval_files:
        return None
    run.recorder.phase("evaluation")
    return run.evaluator.evaluate(weight_version=step)


def save(run: Run, step: int) -> None:
    """Publish the state after `step`, and delete checkpoints beyond checkpoint.keep_last."""
    run.recorder.phase("checkpoint")
    path = run.state.save(step)
    run.recorder.info(f"saved {path}")
    if run.recorder.is_first_rank:
        try:
            run.checkpoints.prune(run.config.checkpoint.keep_last)
        except OSError as error:
            run.recorder.warning(f"an old checkpoint can't be deleted: {error}")


def _generate_and_score(
    run: Run, step: int, clock: Clock
) -> tuple[Trajectories, list[OwnScores] | list[OwnHidden]]:
    """Return the trajectories of a step, and what this rank's teacher scored of each part of them:
    or, for an objective over the whole vocabulary, the hidden states that predict them.

    Ranks of the teacher alone only wait for a part, and those of the student alone don't score it:
    so each part is scored while the next one is generated.
    """
    prompts, parts = _next_prompts(run), []
    scores: list[Any] = []
    is_exact = run.student.vocabulary_objective is not None
    score = run.teacher.hidden_own if is_exact else run.teacher.score_own
    size = len(prompts) // run.config.rollout.num_parts
    for start in range(0, len(prompts), size):
        with clock.phase("rollout"):
            run.recorder.phase("rollout")
            part = run.rollout.generate(
                prompts[start : start + size],
                run.sampling,
                stream=(TRAIN_STREAM, step),
                weight_version=step - 1,
                first_sequence=start,
            )
        with clock.phase("teacher"):
            run.recorder.phase("teacher")
            scores.append(score(part, _label(run, part)))
        parts.append(part)
    return Trajectories.joined(parts), scores


def _share_scores(
    run: Run,
    trajectories: Trajectories,
    labels: Labels,
    scores: Sequence[OwnScores] | Sequence[OwnHidden],
) -> Tensor | Handed:
    """Return the teacher's log-probs on every rank, or its hidden states where they are needed."""
    if run.student.vocabulary_objective is None:
        return run.teacher.shared(cast(Sequence[OwnScores], scores))
    return run.teacher.hand_over(
        cast(Sequence[OwnHidden], scores),
        run.student.layout,
        run.student.copies_of_tokens(trajectories, labels),
    )


def _label(run: Run, trajectories: Trajectories) -> Labels:
    objective = run.config.objective
    return label(
        trajectories,
        objective.terminal,
        teacher_eos_id=run.teacher_eos_id,
        first_percent=objective.window_first_percent,
        after_tokens=objective.window_after_tokens,
    )


def _next_prompts(run: Run) -> list[tuple[int, ...]]:
    samples = run.config.rollout.num_samples_per_prompt
    prompts = run.prompts.next_batch(run.config.global_batch_size // samples)
    return [prompt.token_ids for prompt in prompts for _ in range(samples)]


def _signs(run: Run, step: int) -> PromptSigns | None:
    """Return the signs of the first mini-batch's prompts if the gradient's variance is due."""
    config = run.config
    interval = config.telemetry.gradient_variance_interval
    if not interval or step % interval:
        return None
    return PromptSigns.draw(
        config.mini_batch_size or config.global_batch_size,
        config.rollout.num_samples_per_prompt,
        (config.seed, step),
    )


def _is_due(step: int, interval: int, last_step: int) -> bool:
    return step == last_step or (interval > 0 and step % interval == 0)
