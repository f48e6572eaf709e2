"""The KV cache of ragged rows against lists that grow by hand."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from poweropd_megatron.models import kv_cache
from poweropd_megatron.models.kv_cache import KVCache, attached

HEADS, WIDTH = 2, 3
CPU = torch.device("cpu")


def random_keys(rows: int, positions: int) -> Tensor:
    return torch.randn(rows, HEADS, positions, WIDTH)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "VISIBLE_MULTIPLE", 4)


@pytest.mark.parametrize("seed", range(8))
def test_each_row_reads_back_its_own_keys_and_values_whoever_leaves_and_joins(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_rows = 6
    cache = KVCache(2, num_rows, CPU)
    rows: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]

    def join(places: list[int]) -> None:
        lengths = [rng.randint(1, 9) for _ in places]
        cache.admit(places, lengths)
        for layer, layer_rows in zip(cache.layers, rows, strict=True):
            key, value = (random_keys(len(places), max(lengths)) for _ in range(2))
            got_key, got_value, mask = layer.extend(key, value)
            assert mask is None
            assert torch.equal(got_key, key)
            assert torch.equal(got_value, value)
            for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
                layer_rows[place] = key[i, :, :length], value[i, :, :length]

    join(list(range(num_rows)))
    for _ in range(40):
        free = [place for place in range(num_rows) if place not in rows[0]]
        if free and rng.random() < 0.4:
            join(rng.sample(free, rng.randint(1, len(free))))
        elif len(rows[0]) > 1 and rng.random() < 0.3:
            gone = rng.choice(sorted(rows[0]))
            cache.release([gone])
            for layer_rows in rows:
                del layer_rows[gone]
        elif num_rows > 1 and len(free) > 0 and rng.random() < 0.2:
            stay = sorted(rows[0])
            cache.keep_rows(stay)
            num_rows = len(stay)
            rows = [{i: layer_rows[old] for i, old in enumerate(stay)} for layer_rows in rows]
        cache.advance()
        for layer, layer_rows in zip(cache.layers, rows, strict=True):
            key, value = random_keys(num_rows, 1), random_keys(num_rows, 1)
            got_key, got_value, mask = layer.extend(key, value)
            assert got_key.shape[2] == cache.visible
            for i, (old_key, old_value) in layer_rows.items():
                layer_rows[i] = torch.cat([old_key, key[i]], 1), torch.cat([old_value, value[i]], 1)
                length = old_key.shape[1] + 1
                assert cache.positions_B[i] == length - 1
                visible = mask[i, 0, 0]
                assert visible.tolist() == [p < length for p in range(cache.visible)]
                assert torch.equal(got_key[i][:, visible], layer_rows[i][0])
                assert torch.equal(got_value[i][:, visible], layer_rows[i][1])


def places_of(cache: KVCache) -> tuple[int, ...]:
    """Return where the parts that a decoding step touches are in memory."""
    results = cache.layers[0].extend(random_keys(2, 1), random_keys(2, 1))
    kept = (*results[:2], cache.positions_B, cache.lengths_B)
    return tuple(part.data_ptr() for part in kept)


def test_what_a_step_reads_stays_in_place_while_the_shape_does() -> None:
    cache = KVCache(1, 2, CPU)
    cache.admit([0, 1], [5, 7])
    cache.layers[0].extend(random_keys(2, 7), random_keys(2, 7))
    places: dict[tuple[int, int, int], set[tuple[int, ...]]] = {}
    for _ in range(20):
        cache.advance()
        places.setdefault(cache.shape, set()).add(places_of(cache))
    assert [visible for _, visible, _ in places] == [8, 12, 16, 20, 24, 28]
    assert all(len(seen) == 1 for seen in places.values())


def test_a_prompt_that_moves_the_cache_changes_its_shape_even_if_it_ends_at_once() -> None:
    cache = KVCache(1, 2, CPU)
    cache.admit([0, 1], [3, 2])
    cache.layers[0].extend(random_keys(2, 3), random_keys(2, 3))
    cache.advance()
    shape, places = cache.shape, places_of(cache)
    cache.release([0])
    cache.admit([0], [11])
    cache.layers[0].extend(random_keys(1, 11), random_keys(1, 11))
    cache.release([0])
    cache.advance()
    assert cache.visible == shape[1]
    assert places_of(cache) != places
    assert cache.shape != shape


def test_the_view_shrinks_when_half_of_it_does() -> None:
    cache = KVCache(1, 2, CPU)
    cache.admit([0, 1], [18, 30])
    assert cache.visible == 32
    cache.release([1])
    cache.admit([1], [3])
    assert cache.visible == 32
    cache.release([0])
    assert cache.visible == 4


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
    cache = KVCache(2, 1, CPU)
    inside: list[object] = []

    def fail_inside() -> None:
        with attached([chunk], cache):
            inside.extend(attention.cache for attention in attentions)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert inside == cache.layers
    assert [attention.cache for attention in attentions] == [None, None]
