"""Memory outside the heap: what is cut from one mapping, what is lent twice, and what is kept."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_ref import memory

CPU = torch.device("cpu")


def kept():
    return sum(map(len, memory._spare))


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._spare.clear()
    yield
    memory._spare.clear()


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
    """1 MB after 1 MB: a mapping of its own would have small pages, and touching it takes three times as long."""
    held = [memory.empty((1 << 20,), torch.uint8, CPU).fill_(1) for _ in range(8)]
    places = sorted(x.data_ptr() for x in held)
    assert sum(b - a == 1 << 20 for a, b in zip(places, places[1:], strict=False)) >= 6  # one mapping may end among them


def test_no_two_threads_get_the_same_bytes():
    def fill(number):
        held = [memory.empty((1 << 18,), torch.uint8, CPU).fill_(number) for _ in range(100)]
        assert all((x == number).all() for x in held)
        return [x.data_ptr() for x in held], held

    with ThreadPoolExecutor(4) as pool:
        places = [place for some, _ in pool.map(fill, range(4)) for place in some]
    assert len(set(places)) == 400


def test_what_was_given_back_is_lent_again_and_only_that():
    other = memory.scratch((1 << 22,), torch.uint8, CPU)  # as long as this is lent, as much is kept
    first = memory.scratch((300, 1024), torch.bfloat16, CPU)
    view, place = first[7:9], first.data_ptr()
    del first
    second = memory.scratch((300, 1024), torch.bfloat16, CPU)
    assert second.data_ptr() != place  # a view holds it
    del view
    assert memory.scratch((601, 512), torch.float32, CPU).data_ptr() != place  # too small
    assert memory.scratch((100, 512), torch.float32, CPU).data_ptr() != place  # a waste
    assert memory.scratch((299, 512), torch.float32, CPU).data_ptr() == place  # other numbers, another shape
    assert memory.scratch((2, 3), torch.float32, CPU).shape == (2, 3)  # what is small is the heap's
    del other


def test_no_more_is_kept_than_is_lent():
    tensors = [memory.scratch((1 << 20,), torch.uint8, CPU) for _ in range(8)]
    for left in range(7, -1, -1):
        tensors.pop()
        assert kept() == min(8 - left, left) << 20
    assert not memory._lent


def test_threads_never_share_what_is_lent():
    def fill(number):
        for i in range(200):
            x = memory.scratch((1 << 18,), torch.uint8, CPU)
            x.fill_(number)
            y = memory.scratch((1 << 18,), torch.uint8, CPU)
            y.fill_(number + 1)
            assert (x == number).all() and x.data_ptr() != y.data_ptr(), i

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(0, 8, 2)))
