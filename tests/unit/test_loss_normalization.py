"""What each token counts in the loss, against means of means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poweropd_megatron.objectives.normalization import loss_weights

rows = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6)


def test_the_token_mean_needs_no_weights() -> None:
    assert loss_weights(torch.ones(2, 3, dtype=torch.bool), "token_mean", [[0, 1]]) is None


@given(mask=rows, size=st.integers(1, 3))
def test_weights_make_the_token_mean_a_mean_of_means(mask: list[list[bool]], size: int) -> None:
    mask_BT = torch.tensor(mask)
    values_BT = torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(1)).double()
    numbers = list(range(len(mask)))
    micro_batches = [numbers[start : start + size] for start in range(0, len(mask), size)]
    count = max(int(mask_BT.sum()), 1)
    for normalization, groups in (
        ("sequence_mean", [[row] for row in numbers if any(mask[row])]),
        ("micro_batch_mean", micro_batches),
    ):
        weights_B = loss_weights(mask_BT, normalization, [*micro_batches, []])
        assert weights_B is not None
        weighed = (weights_B.double()[:, None] * values_BT)[mask_BT].sum() / count
        means = [values_BT[group][mask_BT[group]] for group in groups]
        expected = sum(float(v.mean()) if len(v) else 0.0 for v in means) / max(len(groups), 1)
        assert weighed.item() == pytest.approx(expected, abs=1e-6)
