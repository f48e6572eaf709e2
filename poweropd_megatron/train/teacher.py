"""The frozen teacher: log-probs of the student's tokens, from forwards that keep nothing.

Shapes: B sequences, T tokens.
"""

import torch
from torch import Tensor

from poweropd_megatron.config.schema import DType, TeacherConfig
from poweropd_megatron.models.build import TORCH_DTYPES, build_model
from poweropd_megatron.models.finite import check_finite
from poweropd_megatron.models.qwen3 import Qwen3Config
from poweropd_megatron.models.scoring import score_chosen
from poweropd_megatron.objectives.labels import Labels
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.parallel.pipeline import forward_stage
from poweropd_megatron.parallel.world import share_rows
from poweropd_megatron.rollout.trajectories import Trajectories
from poweropd_megatron.train.batching import Batching
from poweropd_megatron.train.microbatches import cut_batch, rows_of


class Teacher:
    """A Qwen3 in its own layout that only scores: no gradients, no optimizer."""

    def __init__(
        self, config: TeacherConfig, model: Qwen3Config, layout: Layout, *, logits_dtype: DType
    ) -> None:
        """Load the teacher's shards. Raises: InputError if the folder's tensors don't fit."""
        self._config = config
        self._logits_dtype = TORCH_DTYPES[logits_dtype]
        self._vocab_size = model.vocab_size
        self._layout = layout
        self.batching = Batching.of(
            layout,
            micro_batch_size=config.micro_batch_size,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        )
        self._chunks = build_model(
            model,
            layout,
            folder=config.path,
            dtype=config.dtype,
            setting="teacher.path",
            megatron=config.megatron,
        )
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, trajectories: Trajectories, labels: Labels) -> Tensor:
        """Return log p_T of each token in the loss, [B, T] fp32 on the CPU of every rank; 0
        elsewhere.

        Raises: NonFiniteError on every rank for NaN or +inf; -inf is a token that can't be.
        Cost: a forward of each sequence on one of the teacher's copies, then one all_reduce of the
        result.
        """
        layout = self._layout
        logp_BT = torch.zeros(trajectories.token_ids_BT.shape)
        micro_batches = cut_batch(
            trajectories,
            labels.mask_BT,
            self.batching,
            dp_rank=layout.dp_rank,
            cp_rank=layout.cp_rank,
        )
        for micro_batch in micro_batches:
            logp_N = forward_stage(
                self._chunks,
                layout,
                micro_batch.token_ids_RS,
                packed_seq_params=micro_batch.packed_seq_params,
                output_processor=score_chosen,
                context=micro_batch.chosen(
                    labels.teacher_BT,
                    vocab_size=self._vocab_size,
                    tp_group=layout.groups.tp,
                    logits_dtype=self._logits_dtype,
                    device=layout.device,
                ),
            )
            if logp_N is not None:
                micro_batch.put(logp_BT, logp_N)
        rows = rows_of(micro_batches)
        whole_BT = share_rows(
            logp_BT[rows],
            rows,
            tuple(logp_BT.shape),
            speaks=layout.speaks_for_model,
            device=layout.device,
        )
        advice = (
            f"the student was not changed. Check the weights in teacher.path ({self._config.path}) "
            f"for NaN, and whether teacher.dtype = {self._config.dtype!r} can hold its activations"
        )
        check_finite("log-probs of the teacher", whole_BT, advice, may_be_impossible=True)
        return whole_BT
