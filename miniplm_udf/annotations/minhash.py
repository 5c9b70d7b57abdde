"""MinHash and its bands: sets of 64-bit hashes to buckets that similar sets share. Pure numpy, on executors.

    a set S, hash functions h_1..h_K -> signature m_i = min over x in S of h_i(x);  P(m_i(A) = m_i(B)) = J(A, B)
    b bands of r minima -> b buckets; two sets share one with the probability 1 - (1 - J^r)^b

The bands are as long as they may be with `RECALL_AT_THRESHOLD` of the pairs found whose similarity is just the
threshold; more similar ones are found oftener. Whether a pair that shares a bucket is similar is for the caller to
tell: by chance others do, too. Constants come from a fixed string, so buckets are the same in any process and version.
Sources: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

import functools
import hashlib
from typing import Any

import numpy as np

N_HASHES = 128
RECALL_AT_THRESHOLD = 0.98

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]


@functools.cache
def bands_of(threshold: float) -> tuple[int, int]:
    """Number of bands and of minima in each."""
    for rows in range(N_HASHES, 1, -1):
        bands = N_HASHES // rows
        if p_shared(threshold, bands, rows) >= RECALL_AT_THRESHOLD:
            return bands, rows
    return N_HASHES, 1


def p_shared(jaccard: float, bands: int, rows: int) -> float:
    """How probable it is that two sets of this similarity share a bucket."""
    return float(1 - (1 - jaccard**rows) ** bands)


@functools.cache
def _constants() -> tuple[UInt64s, UInt64s]:
    """Odd factors and summands of the hash functions x -> a x + b modulo 2^64, of hashes that are uniform already."""
    drawn = np.frombuffer(hashlib.shake_128(b"miniplm minhash").digest(16 * N_HASHES), "<u8").astype(np.uint64)
    return drawn[:N_HASHES] | np.uint64(1), drawn[N_HASHES:]


def signatures(values: UInt64s, lengths: "np.ndarray[Any, Any]") -> UInt64s:
    """Minima by set (first axis) and hash function.

    Args:
        values: the sets' hashes, one set after the other.
        lengths: of the sets, none empty.
    """
    starts = np.cumsum(lengths) - lengths
    found = np.empty((len(lengths), N_HASHES), np.uint64)
    if len(lengths):
        for column, (factor, summand) in enumerate(zip(*_constants(), strict=True)):
            found[:, column] = np.minimum.reduceat(values * factor + summand, starts)
    return found


def buckets(values: UInt64s, lengths: "np.ndarray[Any, Any]", threshold: float) -> "np.ndarray[Any, Any]":
    """Buckets (int64) by set and band; those of different bands differ.

    Args:
        values, lengths: as of `signatures`.
    """
    bands, rows = bands_of(threshold)
    minima = signatures(values, lengths)
    found = np.empty((len(lengths), bands), np.uint64)
    for band in range(bands):
        mixed = np.full(len(lengths), band, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            mixed = _mixed(mixed ^ minima[:, column])
        found[:, band] = mixed
    return found.view(np.int64)


def _mixed(values: UInt64s) -> UInt64s:
    """A bijection in which each bit of the outcome depends on every bit (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
