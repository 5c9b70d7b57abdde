"""Who may hold a model on a GPU: places that processes share."""

import os
from pathlib import Path

import pytest

from miniplm_udf.errors import ScoringError
from miniplm_udf.workers.process_slots import take_slot


def test_there_are_so_many_places_and_one_that_is_left_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first, second = take_slot("gpu", 2, 0.0), take_slot("gpu", 2, 0.0)
    with pytest.raises(ScoringError, match=r"2 other worker processes.*score\.workers_per_gpu"):
        take_slot("gpu", 2, 0.0)
    assert take_slot("another", 1, 0.0)
    first.close()
    take_slot("gpu", 2, 0.0).close()
    second.close()


def test_a_process_that_ends_leaves_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if (child := os.fork()) == 0:
        take_slot("gpu", 1, 0.0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    take_slot("gpu", 1, 0.0).close()
