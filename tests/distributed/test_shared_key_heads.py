"""More tensor-parallel ranks than key-value heads, whose ranks share one: rollouts and resuming.

Training with two ranks to a head is in test_layouts.py.
"""

from pathlib import Path

import torch
from decoding import PROMPTS, decode_in_plain_torch, decode_on_ranks
from layout_rows import parallel, row
from support import qwen3_folder
from support.rank_pool import RankPool
from test_expert_checkpoints import exported, resume, update_and_save

from poweropd_megatron.rollout.sampling import Sampling

GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
TP2 = row("TP2", 2, parallel(2))
TP4 = row("TP4", 4, parallel(4))


def test_four_ranks_to_a_head_decode_like_plain_torch(ranks: RankPool, tmp_path: Path) -> None:
    qwen3_folder.write(tmp_path, vocab_size=37, num_attention_heads=8, num_key_value_heads=2)
    arguments = (parallel(8), str(tmp_path), len(PROMPTS), [GREEDY])
    [trajectories], *_ = ranks.run(decode_on_ranks, *arguments, world_size=8, timeout_seconds=300)
    plain = decode_in_plain_torch(str(tmp_path), GREEDY)
    for number, token_ids in enumerate(plain.token_ids):
        assert trajectories.response_ids(number) == token_ids


def test_a_run_of_two_ranks_to_a_head_is_resumed_with_one_and_exported(
    folders: dict[str, str], ranks: RankPool, tmp_path: Path
) -> None:
    models = (folders["student-untied"], folders["teacher-untied"])
    straight, resumed = str(tmp_path / "straight"), str(tmp_path / "resumed")
    ranks.run(update_and_save, TP4, *models, straight, "fp32", world_size=4)
    ranks.run(resume, TP2, *models, straight, resumed, "fp32", world_size=2)
    expected, found = exported(Path(straight)), exported(Path(resumed))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
