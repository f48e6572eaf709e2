"""Decoding that replays a CUDA graph draws what decoding without one draws."""

from pathlib import Path

import pytest
import torch

from poweropd_megatron.data.tokenizer import Tokenizer
from poweropd_megatron.models import kv_cache
from poweropd_megatron.models.build import build_model
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.parallel.layout import Layout
from poweropd_megatron.rollout.megatron_engine import MegatronRolloutEngine
from poweropd_megatron.rollout.sampling import Sampling
from poweropd_megatron.rollout.trajectories import Trajectories

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STUDENT = Path(__file__).parents[2] / "examples" / "chain_sum" / "student"
TEXTS = ("1+2+3=", "9+9+9+9+9+9=", "5+0+7+2=", "8+1+6=", "3+3+3+3+3=", "0+0+1=", "7+8+9+1=")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=60, temperature=0.0),
        Sampling(max_new_tokens=60),
        Sampling(max_new_tokens=60, temperature=1.5, top_k=8, top_p=0.9),
    ],
    ids=["greedy", "plain", "filtered"],
)
def test_a_graph_draws_the_same_tokens_while_rows_end_and_the_cache_grows(
    sampling: Sampling, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "VISIBLE_MULTIPLE", 8)
    model = read_model_config(STUDENT, setting="student.path")
    [chunk] = build_model(model, layout, folder=str(STUDENT), dtype="fp32", setting="student.path")
    tokenizer = Tokenizer.from_folder(STUDENT)
    prompts = [tokenizer.encode(text) for text in TEXTS * 3]

    def generate(cuda_graph: bool) -> Trajectories:
        engine = MegatronRolloutEngine(
            [chunk],
            layout,
            vocab_size=model.vocab_size,
            stop_token_ids=tokenizer.eos_token_ids,
            micro_batch_size=9,
            seed=1,
            logits_dtype=torch.float32,
            cuda_graph=cuda_graph,
        )
        return engine.generate(prompts, sampling, stream=(0,), weight_version=0)

    eager, replayed = generate(False), generate(True)
    assert len(set(eager.response_lengths_B.tolist())) > 3
    assert torch.equal(replayed.token_ids_BT, eager.token_ids_BT)
    assert torch.equal(replayed.total_lengths_B, eager.total_lengths_B)
    torch.testing.assert_close(
        replayed.behaviour_logp_BT, eager.behaviour_logp_BT, rtol=0, atol=1e-5
    )
