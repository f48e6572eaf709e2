"""The student: weights, Megatron's DDP and optimizer, and the policy-gradient step.

Shapes: B sequences, T tokens, N tokens of the batch in the loss.
"""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from poweropd_megatron.config.schema import TrainConfig
from poweropd_megatron.models.build import TORCH_DTYPES, build_model
from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.models.model_config import ModelConfig
from poweropd_megatron.objectives.exact import build_vocabulary_objective
from poweropd_megatron.objectives.gradient_variance import PromptSigns
from poweropd_megatron.objectives.importance import build_importance_ratio
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.objectives.rewards import BatchReward, Reward
from poweropd_megatron.objectives.weights import TokenWeights, weigh_tokens
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.world import share_rows, told_by_first_rank
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.ddp import finish_param_gather, start_param_gather, wrap
from poweropd_megatron.train.forward_step import MicroBatchResult, build_forward_step
from poweropd_megatron.train.microbatches import MicroBatch, cut_own, rows_of
from poweropd_megatron.train.score_tokens import score_tokens
from poweropd_megatron.train.student_optimizer import build_optimizer, join_building_of_optimizer
from poweropd_megatron.train.student_outcome import StudentOutcome, join_outcomes, own_findings
from poweropd_megatron.train.teacher_hidden import Handed, copies_of_tokens

_ADVICE = (
    "the weights were not changed by this optimizer step. Lower optimizer.lr, set "
    "optimizer.clip_grad, or try objective.kind = 'power'"
)
_OF_TEACHER = (
    "the student was not changed. Check the weights in teacher.path for NaN, and whether "
    "teacher.dtype can hold its activations"
)


class Student:
    """A model that learns: DistributedDataParallel, Megatron's Adam and learning-rate schedule.

    On ranks without the student it has no chunks, no optimizer and no schedule.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        layout: Layout,
        *,
        teacher_head: Tensor | None = None,
    ) -> None:
        """Load the student's shards and build the optimizer over them.

        teacher_head: what load_teacher_head returns, for objectives over the whole vocabulary.
        Raises: InputError if the folder's tensors don't fit.
        """
        self.layout = layout
        self.vocab_size = model.vocab_size
        self._objective = config.objective
        self.vocabulary_objective = build_vocabulary_objective(config.objective)
        self._teacher_head = teacher_head
        self.ratio = build_importance_ratio(config.objective)
        self._mini_batch_size = config.mini_batch_size
        self._logits_dtype = TORCH_DTYPES[config.objective.logits_dtype]
        self.chunks = build_model(
            model,
            layout,
            folder=config.student.path,
            dtype=config.student.dtype,
            setting="student.path",
            megatron=config.student.megatron,
        )
        self.batching = Batching.of_student(layout, config)
        self._ddps: list[DistributedDataParallel] = []
        if layout.holds_model:
            self._ddps = wrap(self.chunks, config)
            self.optimizer, self.schedule = build_optimizer(config, self._ddps)
            start_param_gather(self._ddps)
        else:
            join_building_of_optimizer()

    def finish_param_gather(self) -> None:
        """Wait for the weights that are still on their way; before they are saved or replaced."""
        finish_param_gather(self._ddps)

    def update(
        self,
        trajectories: Trajectories,
        labels: Labels,
        teacher: Tensor | Handed,
        reward: Reward | BatchReward,
        *,
        signs: PromptSigns | None = None,
    ) -> StudentOutcome:
        """Return the outcome of learning from a batch, in an optimizer step for each mini-batch.

        Called by all ranks of the job; those without the student only learn what came of it.
        teacher: its log-probs of the labels, [B, T]; or, with an objective over the whole
        vocabulary, its hidden states, and the reward is for the metrics alone.
        log p_S comes out of the forward that is differentiated, so the reward is never stale; only
        the statistics of a BatchReward are of a forward before, of the whole batch. Each rank works
        on its data-parallel share; the gradient is that of the mean over all tokens in the loss of
        the mini-batch, or of the means that objective.loss_normalization asks for.
        signs, of the first mini-batch, ask for the variance of its gradient, for the price of one
        more forward and backward of it; the update is what it is without them.
        Raises: NonFiniteError on every rank, before the weights change, if a log-prob or the
        gradient isn't finite.
        """
        mask_BT = labels.mask_BT
        if isinstance(reward, BatchReward):
            logp_BT = self.score(trajectories, labels)
            assert isinstance(teacher, Tensor)
            reward = reward.fit(teacher[mask_BT], logp_BT[mask_BT])
        steps = []
        for rows in self._mini_batches(trajectories):
            part = (trajectories.part(rows), labels.part(rows), teacher[rows])
            steps.append(self._step(*part, reward, signs=None if rows.start else signs))
        return join_outcomes(steps)

    def copies_of_tokens(self, trajectories: Trajectories, labels: Labels) -> Tensor:
        """Return which copy of the student will learn from each token: see copies_of_tokens."""
        return torch.cat(
            [
                copies_of_tokens(trajectories.part(rows), labels.mask_BT[rows], self.batching)
                for rows in self._mini_batches(trajectories)
            ]
        )

    def _mini_batches(self, trajectories: Trajectories) -> list[slice]:
        """Return which sequences each optimizer step takes."""
        count = trajectories.num_sequences
        size = self._mini_batch_size or count
        return [slice(start, start + size) for start in range(0, count, size)]

    def score(self, trajectories: Trajectories, labels: Labels) -> Tensor:
        """Return log p_S of each label in the loss, [B, T] fp32 on the CPU of every rank.

        Called by all ranks of the job. Cost: a forward without gradients; one all_reduce of the
        result.
        Raises: NonFiniteError on every rank.
        """
        micro_batches = self._cut(trajectories, labels)
        own_BT = score_tokens(
            self.chunks,
            self.layout,
            micro_batches,
            labels.student_BT,
            vocab_size=self.vocab_size,
            logits_dtype=self._logits_dtype,
        )
        logp_BT = self._shared(own_BT[None], rows_of(micro_batches))[0]
        check_finite("log-probs of the student", logp_BT, _ADVICE)
        return logp_BT

    def _step(
        self,
        trajectories: Trajectories,
        labels: Labels,
        teacher: Tensor | Handed,
        reward: Reward,
        *,
        signs: PromptSigns | None,
    ) -> StudentOutcome:
        """Return the outcome of one forward, backward and optimizer step over all sequences."""
        plan = self.batching.plan(trajectories.total_lengths_B.tolist())
        weights = weigh_tokens(
            trajectories,
            labels,
            normalization=self._objective.loss_normalization,
            micro_batches=[rows for packs in plan for rows in packs],
            ratio=self.ratio,
            score=self.score,
        )
        batch = (trajectories, labels, teacher, reward)
        signed_norm = 0.0
        if signs is not None:
            signs_BT = signs.signs_B[:, None].expand(labels.mask_BT.shape)
            self._accumulate_gradient(*batch, TokenWeights.scaled(weights, signs_BT))
            signed_norm, _ = self._gradient_norm()
        micro_batches, results = self._accumulate_gradient(*batch, weights)
        found = self._gather_found(micro_batches, results, labels.mask_BT.shape, teacher)
        check_finite("log-probs of the student", found["logp_BT"], _ADVICE)
        grad_norm, learning_rate = self._take_step()
        return StudentOutcome(
            **found,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            reward=reward,
            weight_BT=None if weights is None else weights(slice(None), found["logp_BT"]),
            variance={} if signs is None else signs.metrics(signed_norm, grad_norm),
        )

    def _accumulate_gradient(
        self,
        trajectories: Trajectories,
        labels: Labels,
        teacher: Tensor | Handed,
        reward: Reward,
        weights: TokenWeights | None,
    ) -> tuple[list[MicroBatch], list[MicroBatchResult]]:
        """Put the batch's gradient into Megatron's buffers; return what this rank did for it."""
        micro_batches = self._cut(trajectories, labels)
        if not self.layout.holds_model:
            return micro_batches, []
        for ddp in self._ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        results: list[MicroBatchResult] = get_forward_backward_func()(
            forward_step_func=build_forward_step(
                teacher,
                reward,
                self.vocabulary_objective,
                self._teacher_head,
                head=self._objective.head,
                layout=self.layout,
                vocab_size=self.vocab_size,
                logits_dtype=self._logits_dtype,
                labels=labels,
                weights=weights,
            ),
            data_iterator=[iter(micro_batches) for _ in self._ddps],
            model=self._ddps,
            num_microbatches=len(micro_batches),
            seq_length=trajectories.token_ids_BT.shape[1],
            micro_batch_size=self.batching.micro_batch_size,
        )
        return micro_batches, results

    def _gather_found(
        self,
        micro_batches: Sequence[MicroBatch],
        results: Sequence[MicroBatchResult],
        shape: torch.Size,
        teacher: Tensor | Handed,
    ) -> dict[str, Tensor]:
        """Return what all ranks found of each token, for StudentOutcome, on every rank.

        Raises: NonFiniteError if that shows NaN in the teacher.
        """
        own = own_findings(results, shape, is_compared=not isinstance(teacher, Tensor))
        shared = self._shared(torch.stack(list(own.values())), rows_of(micro_batches))
        found = dict(zip(own, shared, strict=True))
        if isinstance(teacher, Tensor):
            return found | {"teacher_logp_BT": teacher}
        logp_BT = found["teacher_logp_BT"]
        check_finite("log-probs of the teacher", logp_BT, _OF_TEACHER, may_be_impossible=True)
        return found

    def _take_step(self) -> tuple[float, float]:
        """Return the gradient's norm and the learning rate, after the step of the optimizer."""
        grad_norm, learning_rate = self._gradient_norm()
        if self.layout.holds_model:
            self.optimizer.step()
            start_param_gather(self._ddps)
            self.schedule.step(increment=1)
        return grad_norm, learning_rate

    def _gradient_norm(self) -> tuple[float, float]:
        """Return the norm of the gradient in the buffers, and the learning rate.

        Raises: NonFiniteError on every rank.
        """
        facts = torch.zeros(2, dtype=torch.float64)
        if self.layout.holds_model:
            self.optimizer.prepare_grads()
            facts[0] = float(self.optimizer.get_grad_norm())
            facts[1] = self.optimizer.param_groups[0]["lr"]
        grad_norm, learning_rate = told_by_first_rank(facts, device=self.layout.device)
        check_finite("gradient norm", grad_norm, _ADVICE)
        return float(grad_norm), float(learning_rate)

    def _cut(self, trajectories: Trajectories, labels: Labels) -> list[MicroBatch]:
        return cut_own(trajectories, labels.mask_BT, self.batching, self.layout)

    def _shared(self, own_KBT: Tensor, rows: Tensor) -> Tensor:
        """Return per-token values of the whole batch on every rank, from each rank's rows."""
        shared = share_rows(
            own_KBT[:, rows].transpose(0, 1),
            rows,
            (own_KBT.shape[1], len(own_KBT), own_KBT.shape[2]),
            speaks=self.layout.speaks_for_model,
            device=self.layout.device,
        )
        return shared.transpose(0, 1)
