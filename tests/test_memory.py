"""Memory outside the heap: what is cut from one mapping, what is lent twice, and what is kept."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_ref import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    """Nothing lent and nothing kept, whatever the tests before have."""
    gc.collect()
    monkeypatch.setattr(memory, "_pool", memory._Pool())
    return memory._pool


def scratch(*shape, dtype=torch.uint8):
    return memory.scratch(shape, dtype, CPU)


def resident():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere tensors are torch's own")


@given(st.lists(st.one_of(st.integers(1, 3 << 20), st.just(-1), st.integers(1 << 24, 1 << 26)), max_size=40), st.randoms())
@settings(max_examples=20, deadline=None)
def test_tensors_of_one_mapping_keep_their_bytes_whoever_goes(sizes, random):
    held = []
    for number, size in enumerate(sizes):
        if size < 0 and held:
            held.pop(random.randrange(len(held)))
        elif size > 0:
            fresh = memory.empty((size,), torch.uint8, CPU)
            assert size < 1 << 18 or not fresh.any()  # nobody's bytes
            held.append((fresh.fill_(1 + number), 1 + number))
        for x, value in held:
            assert x[0] == x[-1] == x[len(x) // 2] == value
    for x, value in held:
        assert (x == value).all()


@linux
def test_what_is_freed_goes_back_though_others_of_its_mapping_stay():
    held = [memory.empty((3 << 20,), torch.uint8, CPU).fill_(1) for _ in range(40)]
    before = resident()
    kept = held[::8]
    held.clear()
    assert 34 * 3 << 20 < before - resident() < 36 * 3 << 20
    assert all((x == 1).all() for x in kept)


@linux
def test_many_that_end_within_a_page_lie_in_few():
    """1 MB after 1 MB: a mapping of its own would have small pages, which take several times as long to touch."""
    held = [memory.empty((1 << 20,), torch.uint8, CPU).fill_(1) for _ in range(8)]
    places = sorted(x.data_ptr() for x in held)
    assert sum(b - a == 1 << 20 for a, b in pairwise(places)) >= 6  # one mapping may end among them


def test_no_two_threads_get_the_same_bytes(monkeypatch):
    up = memory._up
    monkeypatch.setattr(memory, "_up", lambda size, unit: (time.sleep(1e-4), up(size, unit))[1])  # in the middle of `take`

    def take(number):
        return [memory.empty((1 << 18,), torch.uint8, CPU) for _ in range(100)]

    with ThreadPoolExecutor(4) as pool:
        held = [x for some in pool.map(take, range(4)) for x in some]
    assert len({x.data_ptr() for x in held}) == 400


def test_what_was_given_back_is_lent_again_and_only_that():
    first, other = scratch(300, 1024, dtype=torch.bfloat16), scratch(1 << 22)
    view, place = first[7:9], first.data_ptr()
    del first
    assert scratch(300, 1024, dtype=torch.bfloat16).data_ptr() != place  # a view holds it
    del view
    assert scratch(601, 512, dtype=torch.float32).data_ptr() != place  # too small
    part = scratch(299, 256, dtype=torch.float32)
    assert part.data_ptr() == place  # other numbers, another shape, and not all of it
    assert scratch(2, 3, dtype=torch.float32).shape == (2, 3)  # what is small is the heap's
    del other


@linux
def test_when_a_pass_is_over_next_to_nothing_stays(pool):
    before, size = resident(), 8 << 20
    residual, logits = scratch(2 << 20).fill_(1), None
    for _ in range(3):
        large = [scratch(size).fill_(2) for _ in range(4)]
        del large
        assert resident() - before > 4 * size  # within a pass what was touched stays
    logits = scratch(300_000).fill_(3)
    del residual
    assert resident() - before < 9 << 20  # the first pages stay
    assert (logits == 3).all()
    del logits
    assert resident() - before < 9 << 20 and [sheet.lent for sheet in pool.sheets] == [0]


@linux
@pytest.mark.parametrize("first,second", [(125, 3), (1000, 24)])
def test_a_sheet_that_was_full_goes_back_as_well(pool, first, second):
    before = resident()
    one, two = scratch(first << 20), scratch(second << 20)
    two.fill_(1)
    del one
    del two
    assert resident() - before < 9 << 20


@linux
def test_what_is_kept_longer_does_not_have_every_step_give_back(pool, monkeypatch):
    """Logits of a longer prompt lie behind everything that comes later."""
    trims = []
    trim = memory._Sheet.trim
    monkeypatch.setattr(memory._Sheet, "trim", lambda sheet: (trims.append(sheet), trim(sheet)))
    low = scratch(64 << 20)
    logits = scratch(1 << 19).fill_(3)
    del low
    assert len(trims) == 1
    residual = scratch(1 << 20)
    for _ in range(20):
        scratch(6 << 20)
        scratch(3 << 20)
    assert len(trims) == 1
    del residual
    assert len(trims) == 2 and (logits == 3).all()


@linux
def test_a_forked_process_waits_for_no_thread_that_it_has_not(pool):
    with pool._lock, memory._arena._lock:
        child = os.fork()
        if not child:
            signal.alarm(10)
            scratch(1 << 20), memory.empty((1 << 20,), torch.uint8, CPU)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@linux
def test_what_is_larger_than_a_sheet_gets_one_that_goes_with_it(pool):
    small, large = scratch(1 << 20), scratch(memory._SHARED + 5)
    assert [len(sheet.memory) for sheet in pool.sheets] == [memory._SHARED, memory._SHARED + memory._HUGE]
    del small, large
    assert len(pool.sheets) == 1


@linux
@given(st.lists(st.one_of(st.integers(1 << 18, 3 << 20), st.just(-1), st.just(-1)), max_size=60), st.randoms())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_lent_twice_and_nothing_is_lost(pool, sizes, random):
    held = []
    for number, size in enumerate(sizes):
        if size < 0 and held:
            held.pop(random.randrange(len(held)))
        elif size > 0:
            held.append((scratch(size).fill_(number % 256), number % 256))
        for sheet in pool.sheets:
            assert all(a < b for a, b in sheet.free)
            assert all(b < c for (_, b), (c, _) in pairwise(sheet.free))  # in order, joined
        pages = sum(-(-len(x) // mmap.PAGESIZE) for x, _ in held)
        assert sum(sheet.lent for sheet in pool.sheets) == pages * mmap.PAGESIZE
    assert all((x == value).all() for x, value in held)


@linux
@pytest.mark.parametrize("step", ["take", "put"])
def test_one_thread_at_a_time_changes_what_is_free(pool, monkeypatch, step):
    locked, change = [], getattr(memory._Sheet, step)
    monkeypatch.setattr(memory._Sheet, step, lambda *args: (locked.append(pool._lock.locked()), change(*args))[1])
    for _ in range(3):
        scratch(1 << 20)
    assert len(locked) >= 2 and all(locked)


@linux
def test_what_goes_while_another_thread_lends_is_free_afterwards(pool):
    """A finalizer may run anywhere, in the middle of `lend` too, and must not wait there."""
    first = scratch(1 << 20)
    place = first.data_ptr()
    with pool._lock:
        del first
        gc.collect()
    assert pool.sheets[0].lent == 1 << 20
    assert scratch(1 << 20).data_ptr() == place


def test_threads_never_share_what_is_lent():
    def fill(number):
        for i in range(200):
            x = scratch(1 << 18)
            x.fill_(number)
            y = scratch(1 << 18)
            y.fill_(number + 1)
            assert (x == number).all() and x.data_ptr() != y.data_ptr(), i

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(0, 8, 2)))
