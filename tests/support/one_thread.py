"""Torch on one thread. Bit-identical weights need the same number of threads, and tiny products are fastest on one.

A test module imports one of the two fixtures; it then holds for every test of the module.
"""

from collections.abc import Iterator

import pytest
import torch


def _on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(autouse=True, name="one_thread")(_on_one_thread)
one_thread_in_module = pytest.fixture(scope="module", autouse=True, name="one_thread_in_module")(_on_one_thread)
