"""A training model as one that decodes, and back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from poweropd_megatron.models.context_parallel import whole_sequences
from poweropd_megatron.parallel.layout import Layout


@contextmanager
def decoding_mode(chunks: Sequence[GPTModel], layout: Layout) -> Iterator[None]:
    """Put a model into evaluation, without sequence and context parallelism: a step has one
    position.

    Without cuDNN's attention, too: over a masked cache it was seen to give other bits in a second
    run.
    """
    was_training = chunks[0].training
    sequence_parallel = layout.parallel.sequence_parallel
    with_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    for chunk in chunks:
        chunk.eval()
        if sequence_parallel:
            set_model_to_sequence_parallel(chunk, False)
    try:
        with whole_sequences(chunks):
            yield
    finally:
        set_positions(chunks, None)
        for chunk in chunks:
            if sequence_parallel:
                set_model_to_sequence_parallel(chunk, True)
            chunk.train(was_training)
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)


def set_positions(chunks: Sequence[GPTModel], positions_B: Tensor | None) -> None:
    """Set the position of the one token that each row holds; None where rows are whole."""
    for chunk in chunks:
        chunk.rotary_pos_emb.positions_B = positions_B
