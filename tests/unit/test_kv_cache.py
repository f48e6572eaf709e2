"""The KV cache of ragged rows against lists that grow by hand."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from poweropd_megatron.models import kv_cache
from poweropd_megatron.models.kv_cache import KVCache, attached

HEADS, WIDTH = 2, 3


def random_keys(rows: int, positions: int) -> Tensor:
    return torch.randn(rows, HEADS, positions, WIDTH)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "VISIBLE_MULTIPLE", 4)


@pytest.mark.parametrize("seed", range(8))
def test_each_row_reads_back_its_own_keys_and_values_whoever_leaves(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [rng.randint(1, 9) for _ in range(6)]
    cache = KVCache(2, torch.tensor(lengths))
    prompts = [(random_keys(6, max(lengths)), random_keys(6, max(lengths))) for _ in range(2)]
    rows: list[list[tuple[Tensor, Tensor]]] = []
    for layer, (key, value) in zip(cache.layers, prompts, strict=True):
        got_key, got_value, mask = layer.extend(key, value)
        assert mask is None
        assert torch.equal(got_key, key)
        assert torch.equal(got_value, value)
        rows.append([(key[i, :, :n], value[i, :, :n]) for i, n in enumerate(lengths)])

    for _ in range(25):
        if len(lengths) > 1 and rng.random() < 0.25:
            stay = sorted(rng.sample(range(len(lengths)), rng.randint(1, len(lengths))))
            cache.keep_rows(torch.tensor(stay))
            lengths = [lengths[i] for i in stay]
            rows = [[layer_rows[i] for i in stay] for layer_rows in rows]
        cache.advance()
        assert cache.positions_B.tolist() == lengths
        lengths = [length + 1 for length in lengths]
        for number, layer in enumerate(cache.layers):
            key, value = random_keys(len(lengths), 1), random_keys(len(lengths), 1)
            rows[number] = [
                (torch.cat([old_key, key[i]], dim=1), torch.cat([old_value, value[i]], dim=1))
                for i, (old_key, old_value) in enumerate(rows[number])
            ]
            got_key, got_value, mask = layer.extend(key, value)
            assert got_key.shape[2] == cache.visible
            for i, (row_key, row_value) in enumerate(rows[number]):
                visible = mask[i, 0, 0]
                assert visible.tolist() == [p < lengths[i] for p in range(cache.visible)]
                assert torch.equal(got_key[i][:, visible], row_key)
                assert torch.equal(got_value[i][:, visible], row_value)


def test_what_a_step_reads_stays_in_place_while_its_view_does() -> None:
    cache = KVCache(1, torch.tensor([5, 7]))
    cache.layers[0].extend(random_keys(2, 7), random_keys(2, 7))
    places: dict[int, set[tuple[int, ...]]] = {}
    for _ in range(20):
        cache.advance()
        results = cache.layers[0].extend(random_keys(2, 1), random_keys(2, 1))
        kept = (*results[:2], cache.positions_B, cache.lengths_B)
        places.setdefault(cache.visible, set()).add(tuple(part.data_ptr() for part in kept))
    assert list(places) == [8, 12, 16, 20, 24, 28]
    assert all(len(seen) == 1 for seen in places.values())


def test_the_prompts_are_not_changed_by_what_is_generated() -> None:
    cache = KVCache(1, torch.tensor([1, 4]))
    key, value = random_keys(2, 4), random_keys(2, 4)
    before = key.clone()
    cache.layers[0].extend(key, value)
    cache.advance()
    cache.layers[0].extend(random_keys(2, 1), random_keys(2, 1))
    assert torch.equal(key, before)


def test_attentions_have_their_cache_inside_the_block_only_even_if_it_raises() -> None:
    attentions = [SimpleNamespace(cache=None) for _ in range(2)]
    chunk = SimpleNamespace(
        decoder=SimpleNamespace(
            layers=[
                SimpleNamespace(self_attention=SimpleNamespace(core_attention=attention))
                for attention in attentions
            ]
        )
    )
    cache = KVCache(2, torch.tensor([1]))
    inside: list[object] = []

    def fail_inside() -> None:
        with attached([chunk], cache):
            inside.extend(attention.cache for attention in attentions)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert inside == cache.layers
    assert [attention.cache for attention in attentions] == [None, None]
