"""Peak memory is a function of the token budget: not of a vocabulary's logits, the corpus, or a document's length.

Each measure is taken in a process of its own (`memory_probe`), whose heap nothing else has touched.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.memory_probe import MIB

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"),
]
REPOSITORY = Path(__file__).parents[2]


def probe(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_probe", name],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.long
def test_a_vocabulary_of_152k_takes_less_than_its_logits() -> None:
    measures = probe("vocabulary")
    assert measures["n_tokens"] == [1024] * 9
    assert measures["peak_of_one"] < measures["logits_of_one"] * 0.25
    assert measures["peak_of_eight"] < measures["logits_of_one"] * 0.25, "eight texts take no more than one"


@pytest.mark.long
def test_a_corpus_of_ten_times_the_size_takes_the_same() -> None:
    measures = probe("corpus")
    assert measures["n_tokens"] == [100_000, 1_000_000]
    # The allocator keeps some MB more or less from run to run.
    assert measures["peak_of_large"] < measures["peak_of_small"] + 8 * MIB
    assert measures["peak_of_large"] < measures["bytes_of_large"]


@pytest.mark.long
def test_a_document_of_50_mb() -> None:
    measures = probe("document")
    assert measures["n_tokens"] == [1, measures["n_words"], 1]
    assert measures["n_bytes"] == [16, measures["n_words"] * 16, 16]
    assert measures["n_words"] * 16 == 50 * MIB
    assert measures["neighbours"][0] == pytest.approx(measures["neighbours"][1], abs=1e-5)
    assert all(map(math.isfinite, measures["neighbours"]))
    # Its text, its pieces and its ids are there; what a pass takes is not multiplied by its length.
    assert measures["peak"] < 5 * 50 * MIB


def test_an_allocation_that_fails_halves_the_batch() -> None:
    """No error is made up here: the process may not take more memory than it is given."""
    measures = probe("limit")
    assert measures["halved"] >= 1
    assert measures["n_tokens"] == [300] * 64
    assert measures["worst"] < 1e-5
