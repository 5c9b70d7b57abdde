"""MinHash: signatures estimate the similarity, buckets are shared as often as the formula says."""

import functools
import random

import numpy as np
import pytest

from miniplm_udf.annotations import minhash
from miniplm_udf.annotations.minhash import UInt64s
from tests.support.annotation_oracles import jaccard, plant


def pairs_of(jaccard: float, n_pairs: int, size: int = 200) -> list[tuple[UInt64s, UInt64s]]:
    """Pairs of sets of random hashes."""
    rng = np.random.default_rng(7)
    n_shared = round(jaccard * size)
    n_own = (size - n_shared) // 2
    pairs = []
    for _ in range(n_pairs):
        drawn = rng.integers(0, 2**64, n_shared + 2 * n_own, dtype=np.uint64)
        shared, one, other = np.split(drawn, [n_shared, n_shared + n_own])
        pairs.append((np.concatenate([shared, one]), np.concatenate([other, shared])))
    return pairs


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_equal_minima_estimate_the_similarity(similarity: float) -> None:
    are_equal = [minhash.signature(one) == minhash.signature(other) for one, other in pairs_of(similarity, n_pairs=100)]
    # Four standard errors of 12,800 draws.
    error = (similarity * (1 - similarity) / (100 * minhash.N_HASHES)) ** 0.5
    assert abs(np.mean(are_equal) - similarity) < 4 * error


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_buckets_are_shared_as_often_as_the_formula_says(similarity: float) -> None:
    threshold, n_pairs = 0.8, 500
    buckets = functools.partial(minhash.buckets, threshold=threshold)
    share_a_bucket = [not set(buckets(one)).isdisjoint(buckets(other)) for one, other in pairs_of(similarity, n_pairs)]
    expected = minhash.p_shared(similarity, *minhash.bands_of(threshold))
    assert abs(np.mean(share_a_bucket) - expected) < 4 * (expected * (1 - expected) / n_pairs) ** 0.5 + 0.005


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_are_as_long_as_the_recall_at_the_threshold_allows(threshold: float) -> None:
    bands, rows = minhash.bands_of(threshold)
    assert bands * rows <= minhash.N_HASHES
    assert minhash.p_shared(threshold, bands, rows) >= minhash.RECALL_AT_THRESHOLD or rows == 1
    if rows < minhash.N_HASHES:
        assert minhash.p_shared(threshold, minhash.N_HASHES // (rows + 1), rows + 1) < minhash.RECALL_AT_THRESHOLD


def test_buckets_belong_to_the_set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (one, _), *_ = pairs_of(0.5, n_pairs=1)
    buckets = minhash.buckets(one, 0.8)
    # Buckets of different bands differ, so one column can hold all of them.
    assert len(set(buckets)) == minhash.bands_of(0.8)[0]
    for shown in (one[::-1], np.repeat(one, 2)):
        assert minhash.buckets(shown, 0.8) == buckets
    monkeypatch.setattr(minhash, "_SLICE", 7)
    assert minhash.buckets(one, 0.8) == buckets


def test_buckets_never_change() -> None:
    # The buckets of annotated rows are in tables: new rows must get the same.
    buckets = minhash.buckets(np.array([1, 2, 3], np.uint64), 0.8)
    assert buckets[:2] == [2834411321501754654, 5346860063759170464]


def test_planted_texts_are_as_alike_as_they_say() -> None:
    rng = random.Random(3)
    for target in (0.6, 0.8, 0.95):
        pairs = [plant(rng, target, 150) for _ in range(10)]
        assert all(one.jaccard == jaccard(one.original, one.copy) for one in pairs)
        assert all(target - 0.1 < one.jaccard <= target for one in pairs)
