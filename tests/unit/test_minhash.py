"""MinHash: signatures estimate the similarity, buckets are shared as often as the formula says, for any set."""

import random

import numpy as np
import pytest

from miniplm_udf.annotations import minhash
from tests.unit.annotation_oracles import jaccard, plant


def sets_of(jaccard: float, n_pairs: int, size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of sets of random hashes, at places 2 i and 2 i + 1, as values and lengths."""
    rng = np.random.default_rng(7)
    n_shared = round(jaccard * size)
    n_own = (size - n_shared) // 2
    parts = []
    for _ in range(n_pairs):
        drawn = rng.integers(0, 2**64, n_shared + 2 * n_own, dtype=np.uint64)
        shared, one, other = np.split(drawn, [n_shared, n_shared + n_own])
        parts += [np.concatenate([shared, one]), np.concatenate([other, shared])]
    return np.concatenate(parts), np.array([len(part) for part in parts])


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_equal_minima_estimate_the_similarity(similarity: float) -> None:
    found = minhash.signatures(*sets_of(similarity, n_pairs=100))
    equal = (found[::2] == found[1::2]).mean()
    # Four standard errors of 12,800 draws.
    assert abs(equal - similarity) < 4 * (similarity * (1 - similarity) / (100 * minhash.N_HASHES)) ** 0.5


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_buckets_are_shared_as_often_as_the_formula_says(similarity: float) -> None:
    threshold, n_pairs = 0.8, 500
    found = minhash.buckets(*sets_of(similarity, n_pairs), threshold)
    shared = (found[::2] == found[1::2]).any(axis=1).mean()
    expected = minhash.p_shared(similarity, *minhash.bands_of(threshold))
    assert abs(shared - expected) < 4 * (expected * (1 - expected) / n_pairs) ** 0.5 + 0.005


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_are_as_long_as_the_recall_at_the_threshold_allows(threshold: float) -> None:
    bands, rows = minhash.bands_of(threshold)
    assert bands * rows <= minhash.N_HASHES
    assert minhash.p_shared(threshold, bands, rows) >= minhash.RECALL_AT_THRESHOLD or rows == 1
    if rows < minhash.N_HASHES:
        assert minhash.p_shared(threshold, minhash.N_HASHES // (rows + 1), rows + 1) < minhash.RECALL_AT_THRESHOLD


def test_buckets_belong_to_the_set_alone() -> None:
    values, lengths = sets_of(0.5, n_pairs=3)
    together = minhash.buckets(values, lengths, 0.8)
    ends = np.cumsum(lengths)
    for number, end in enumerate(ends):
        own = values[end - lengths[number] : end]
        # Alone, in another order, with repetitions.
        for shown in (own, own[::-1], np.repeat(own, 2)):
            alone = minhash.buckets(shown, np.array([len(shown)]), 0.8)
            assert (alone == together[number]).all()
    # Buckets of different bands differ, so that one column holds all.
    assert len(np.unique(together[0])) == together.shape[1]


def test_no_sets_have_no_buckets() -> None:
    empty = np.array([], np.uint64)
    assert minhash.buckets(empty, np.array([], np.int64), 0.8).shape == (0, minhash.bands_of(0.8)[0])


def test_the_constants_never_change() -> None:
    # The buckets of annotated rows are in tables: new rows must get the same.
    found = minhash.buckets(np.array([1, 2, 3], np.uint64), np.array([3]), 0.8)
    assert [int(bucket) for bucket in found[0, :2]] == [-1632670776416277325, 8500320468690402186]


def test_planted_texts_are_as_alike_as_they_say() -> None:
    rng = random.Random(3)
    for target in (0.6, 0.8, 0.95):
        made = [plant(rng, target, 150) for _ in range(10)]
        assert all(one.jaccard == jaccard(one.original, one.copy) for one in made)
        assert all(target - 0.1 < one.jaccard <= target for one in made)
