"""Memory outside the heap: what is lent twice, and what is kept."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen_ref import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._spare.clear()
    yield
    memory._spare.clear()


def kept():
    return sum(size * len(of_size) for size, of_size in memory._spare.items())


def test_what_was_given_back_is_lent_again_and_only_that():
    first = memory.scratch((300, 1024), torch.bfloat16, CPU)
    view, place = first[7:9], first.data_ptr()
    del first
    other = memory.scratch((300, 1024), torch.bfloat16, CPU)
    assert other.data_ptr() != place  # a view holds it
    del view
    assert memory.scratch((300, 512), torch.float32, CPU).data_ptr() == place  # the same bytes in another shape
    assert memory.scratch((301, 512), torch.float32, CPU).data_ptr() != place
    assert memory.scratch((2, 3), torch.float32, CPU).shape == (2, 3)  # what is small is the heap's


def test_no_more_is_kept_than_said(monkeypatch):
    monkeypatch.setattr(memory, "_SPARE", 3 << 20)
    tensors = [memory.scratch((1 << 20,), torch.uint8, CPU) for _ in range(8)]
    del tensors
    assert 0 < kept() <= 3 << 20
    large = memory.scratch((5 << 20,), torch.uint8, CPU)
    del large
    assert kept() <= 3 << 20


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
