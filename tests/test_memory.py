"""Memory outside the heap: what is lent twice, and what is kept."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
