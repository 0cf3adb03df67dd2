"""Reading a text in any number of passes, alone or in a batch, padded or not, computes the same."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from conftest import TINY, make_pair
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_ref import backend
from qwen_ref.cache import KVCache, RecurrentCache, SlidingKVCache
from qwen_ref.errors import RequestError

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CONFIGS = {
    **{name: config for name, (_, config) in TINY.items()},
    "qwen2 sliding": {**TINY["qwen2"][1], **SLIDING},
    "qwen2_moe sliding": {**TINY["qwen2_moe"][1], **SLIDING, "max_window_layers": 2},
    "qwen3_moe sliding": {**TINY["qwen3_moe"][1], **SLIDING},
}
HYBRID = [name for name, config in CONFIGS.items() if "linear_num_key_heads" in config]
# The hybrids in fp64: their norms divide by what may be small, and an fp32 rounding of it can grow a thousandfold.
MODELS = {name: make_pair(config)[0].to(torch.float64 if name in HYBRID else torch.float32) for name, config in CONFIGS.items()}
IDS = torch.randint(0, 211, (3, 17), generator=torch.Generator().manual_seed(2))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32, logits of scale 1..10: sums in another order
CLOSER = {"rtol": 1e-9, "atol": 1e-10}  # fp64


def close(name):
    return CLOSER if name in HYBRID else CLOSE


@pytest.fixture(params=["eager", "torch"], autouse=True)
def implementation(request):
    with backend.use({"attention": request.param}, strict=True), torch.no_grad():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_every_split_point(name):
    model = MODELS[name]
    whole = model(IDS)
    for split in range(1, IDS.shape[1]):
        cache = model.make_cache()
        parts = [model(IDS[:, :split], cache=cache), model(IDS[:, split:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **close(name))
        assert cache.length == IDS.shape[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_token_by_token(name):
    model, cache = MODELS[name], MODELS[name].make_cache()
    steps = [model(IDS[:, i : i + 1], cache=cache) for i in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), model(IDS), **close(name))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("held", "given"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_sequences_is_refused(name, held, given):
    """And leaves the cache as it was; rows taken over, or nothing held, are a beginning."""
    model, cache = MODELS[name], MODELS[name].make_cache()
    model(IDS[:held, :9], cache=cache)
    with pytest.raises(RequestError, match=f"holds {held} sequences and is given tokens of {given}"):
        model(IDS[:given, 9:], cache=cache)
    torch.testing.assert_close(model(IDS[:held, 9:], cache=cache), model(IDS[:held])[:, 9:], **close(name))
    cache.select(torch.zeros(given, dtype=torch.int64))
    assert model(IDS[:given, :1], cache=cache).shape[0] == given
    cache.truncate(0)
    torch.testing.assert_close(model(IDS[:held], cache=cache), model(IDS[:held]), **close(name))


@given(cuts=st.lists(st.integers(1, 16), max_size=5, unique=True), padding=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_moe sliding", "qwen3_next", "qwen3_5", "qwen4_exp"])
def test_any_chunks_with_left_padding(name, implementation, cuts, padding, seed):
    """A row padded on the left, read in any chunks beside an unpadded one, equals the row alone."""
    model = MODELS[name]
    ids = torch.randint(0, 211, (2, 17), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(17).repeat(2, 1)
    positions[1] = (positions[1] - padding).clamp_min(-1)
    with torch.no_grad():
        cache, parts = model.make_cache(), []
        edges = [0, *sorted(cuts), 17]
        for a, b in pairwise(edges):
            parts.append(model(ids[:, a:b], positions[:, a:b], cache))
        out = torch.cat(parts, 1)
        torch.testing.assert_close(out[0], model(ids[:1])[0], **close(name))
        torch.testing.assert_close(out[1, padding:], model(ids[1:, padding:])[0], **close(name))
        after = model(ids[:, :1], cache=cache)  # positions continue per row
        alone = model(torch.cat((ids[1:, padding:], ids[1:, :1]), 1))
        torch.testing.assert_close(after[1, 0], alone[0, -1], **close(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_equals_single(name):
    model = MODELS[name]
    torch.testing.assert_close(model(IDS), torch.cat([model(row[None]) for row in IDS]), **close(name))


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", *HYBRID])
def test_truncate_and_select(name):
    model, cache = MODELS[name], MODELS[name].make_cache(rewind=17)
    model(IDS, cache=cache)
    cache.truncate(6)
    cache.select(torch.tensor([2, 0]))
    out = model(IDS[[2, 0], 6:], cache=cache)
    torch.testing.assert_close(out, model(IDS[[2, 0]])[:, 6:], **close(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HYBRID)
def test_splits_at_the_edges_of_chunks(name, dtype):
    """The delta rule goes by chunks of 64 tokens. In fp32 a split may lose four times what the whole pass loses itself."""
    exact = MODELS[name]
    model = copy.deepcopy(exact).to(dtype)
    ids = torch.randint(0, 211, (2, 131), generator=torch.Generator().manual_seed(5))
    truth, whole = exact(ids), model(ids)
    bound = 1e-9 if dtype == torch.float64 else 4 * float((whole - truth).norm())
    for split in (1, 63, 64, 65, 127, 128):
        cache = model.make_cache()
        parts = torch.cat([model(ids[:, :split], cache=cache), model(ids[:, split:], cache=cache)], 1)
        assert float((parts - truth).norm()) <= bound, split


@pytest.mark.parametrize("name", HYBRID)
def test_a_marked_length_can_be_come_back_to(name):
    """A state that is not remembered cannot be computed backwards: the nearest mark before it can be kept."""
    model, cache = MODELS[name], MODELS[name].make_cache()
    model(IDS[:, :7], cache=cache)
    cache.mark()
    model(IDS[:, 7:], cache=cache)
    assert [cache.reachable(n) for n in (17, 16, 8, 7, 6, 0)] == [17, 7, 7, 7, 0, 0]
    with pytest.raises(RequestError, match="cannot cut a cache of 17 tokens back to 9: .*; 7 can be kept"):
        cache.truncate(9)
    for _ in range(2):  # the mark stays
        cache.truncate(7)
        torch.testing.assert_close(model(IDS[:, 7:], cache=cache), model(IDS)[:, 7:], **CLOSER)
    cache.truncate(0)
    torch.testing.assert_close(model(IDS, cache=cache), model(IDS), **CLOSER)


@pytest.mark.parametrize("name", HYBRID)
def test_a_state_keeps_nothing_of_the_prompt_alive(name):
    """Its tensors are no views of what the pass computed: memory is what `nbytes` says, however long the prompt was."""
    model, cache = MODELS[name], MODELS[name].make_cache()
    model(IDS, cache=cache)
    parts = [part for layer in cache.layers for part in (vars(layer).get("embedding"), vars(layer).get("mixer", layer))]
    states = [x for part in parts if isinstance(part, RecurrentCache) for x in part.state]
    assert states and all(x.untyped_storage().nbytes() == x.nbytes for x in states)


@pytest.mark.parametrize("name", [*HYBRID, "qwen3", "qwen3_moe sliding"])
def test_a_snapshot_is_left_alone_by_everything_after_it(name):
    model, cache = MODELS[name], MODELS[name].make_cache()
    model(IDS[:, :7], cache=cache)
    kept = cache.snapshot()
    before = kept.nbytes()
    model(IDS[:, 7:], cache=cache)
    cache.select(torch.tensor([1]))
    other = model.make_cache()
    other.restore(kept)
    for held in (kept, other):
        assert held.length == 7
        torch.testing.assert_close(model(IDS[:, 7:], cache=held), model(IDS)[:, 7:], **close(name))
    assert before <= other.nbytes()
    cache.restore(kept.snapshot())
    assert cache.length == 17


@given(steps=st.lists(st.tuples(st.sampled_from(["read", "write", "mark", "copy", "cut", "break"]), st.integers(0, 9)), max_size=12),
       rewind=st.integers(0, 5))  # fmt: skip
@example(steps=[("read", 3), ("write", 0), ("mark", 0), ("write", 0)], rewind=0)
@example(steps=[("read", 3), ("write", 0), ("copy", 0), ("write", 0), ("copy", 1), ("write", 0)], rewind=0)
@example(steps=[("read", 3), ("write", 2), ("mark", 0), *[("write", 2)] * 4], rewind=2)
@example(steps=[("read", 3), ("write", 2), ("copy", 0), *[("write", 2)] * 4], rewind=2)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_recurrent_cache_is_a_list_of_states(implementation, steps, rewind):
    """Against the plainest model of it: the state is the number of every token read so far. What is written over a state
    reaches no mark, no recent token and no copy."""
    cache, history, others = RecurrentCache(rewind), [], []

    def state(history):
        return torch.tensor([*history, *[-1] * (200 - len(history))])

    for step, n in steps:
        if step == "read" or (step == "write" and cache.state is None):
            for piece in cache.pieces(n):
                history += range(len(history), len(history) + piece.stop - piece.start)
                cache.advance(piece.stop - piece.start, state(history))
        elif step == "write":
            states = cache.ahead(min(n, rewind) or 1)
            for (memory,) in states[1:]:
                history.append(len(history))
                memory.copy_(state(history))
            cache.follow(states)
            assert cache.state[0] is memory and (rewind or cache._own[0] is memory)  # no new memory for every token
            assert len(cache._pool) <= rewind + 1 + len(cache._marks)
        elif step == "break" and cache.state is not None:  # a pass that has written, and does not come to its end
            for (memory,) in cache.ahead(min(n, rewind) or 1)[1:]:
                memory.fill_(-5)
            length = cache.reachable(len(history))
            assert length == len(history) if rewind else length < len(history) or length in (0, *cache._marks)
            cache.truncate(length)
            history = history[:length]
        elif step == "copy":
            others.append((cache.copy(), list(history)))
            if n % 2:
                others[-1], (cache, history) = (cache, history), (others[-1][0], list(history))
        elif step == "mark":
            cache.mark()
            assert cache.reachable(len(history)) == len(history)
        else:
            length = cache.reachable(min(n, len(history)))
            assert length <= n
            cache.truncate(length)
            history = history[:length]
        assert cache.length == len(history)
        for held, tokens in [*others, (cache, history)]:
            for at, kept in [(len(tokens), held.state), *held._marks.items(), *held._recent.items()]:
                assert (kept[0].tolist() if kept else state([]).tolist()) == state(tokens[:at]).tolist()
        assert cache.reachable(len(history)) == len(history) and cache.reachable(0) == 0
        assert len(cache._marks) <= cache.MARKS and len(cache._recent) <= max(rewind, 0)


def test_memory_for_states_is_given_back_and_travels_with_no_copy():
    cache = RecurrentCache(4)
    cache.advance(3, torch.zeros(2, 5))
    cache.follow(cache.ahead(4))
    assert cache.nbytes() == 5 * 40 and len(pickle.loads(pickle.dumps(cache))._pool) == len(copy.deepcopy(cache)._pool) == 0
    cache.remember(1)
    assert cache.nbytes() == 2 * 40
    cache.follow(cache.ahead(1))
    cache.remember(0)
    assert cache.nbytes() == 40 and cache.length == 8


def test_sliding_cache_holds_the_window_only_and_says_what_it_cannot_cut():
    model, cache = MODELS["qwen3_moe sliding"], MODELS["qwen3_moe sliding"].make_cache()
    for i in range(17):
        model(IDS[:, i : i + 1], cache=cache)
    layer = cache.layers[0]
    assert isinstance(layer, SlidingKVCache) and layer._buffer.shape[3] == 5
    with pytest.raises(RequestError, match="cannot cut a cache of 17 tokens back to 9"):
        cache.truncate(9)
    model(IDS[:, :12], cache=cache)  # one long append can be taken back
    cache.truncate(18)
    expected = model(torch.cat((IDS, IDS[:, :1], IDS[:, :4]), 1))[:, -4:]
    torch.testing.assert_close(model(IDS[:, :4], cache=cache), expected, **CLOSE)


@given(steps=st.lists(st.integers(1, 70), min_size=1, max_size=8), keep=st.floats(0, 1))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kv_cache_is_a_list_of_columns(implementation, steps, keep):
    """Against the plainest model of it: concatenation. Grown buffers are poisoned, so unwritten memory would show."""
    cache, columns = KVCache(), torch.empty(2, 2, 3, 0, 4)
    for n in steps:
        kv = torch.randn(2, 2, 3, n, 4)
        columns = torch.cat((columns, kv), 3)
        k, v = cache.append(kv[0], kv[1])
        assert torch.equal(k, columns[0]) and torch.equal(v, columns[1])
        cache._buffer[:, :, :, cache.length :] = torch.nan
        length = int(cache.length * keep)
        cache.truncate(length)
        columns = columns[:, :, :, :length]
