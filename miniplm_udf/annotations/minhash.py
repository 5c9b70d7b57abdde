"""Buckets that similar sets share: datasketch's MinHash, cut into bands. Runs on executors; no Spark.

    a set S, hash functions h_1..h_K -> signature m_i = min over x in S of h_i(x);  P(m_i(A) = m_i(B)) = J(A, B)
    b bands of r minima -> b buckets; two sets share a bucket with probability 1 - (1 - J^r)^b

The bands are as long as possible while `RECALL_AT_THRESHOLD` of the pairs with exactly the threshold's similarity are
found; more similar pairs are found more often. (datasketch's own LSH index is a dictionary in one process, and weighs
recall against precision; here a join finds the pairs, and the caller rejects pairs by chance.) The seed and the scheme
are fixed, so the buckets are the same in any process.
Sources: Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", chapter 3.
"""

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasketch import MinHash

N_HASHES = 128
RECALL_AT_THRESHOLD = 0.98
# Values hashed at once; each takes 1 KiB of memory.
_SLICE = 16_384

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]


@functools.cache
def bands_of(threshold: float) -> tuple[int, int]:
    """Chooses how a signature is cut into bands, so that few pairs above a threshold are missed.

    Args:
        threshold: Jaccard similarity, 0 to 1, from which on a pair should be found.

    Returns:
        The number of bands, and the number of minima in each; together at most N_HASHES minima.
    """
    for rows in range(N_HASHES, 1, -1):
        bands = N_HASHES // rows
        if p_shared(threshold, bands, rows) >= RECALL_AT_THRESHOLD:
            return bands, rows
    return N_HASHES, 1


def p_shared(jaccard: float, bands: int, rows: int) -> float:
    """Returns the probability, 0 to 1, that two sets share a bucket: all minima of at least one band are equal.

    Args:
        jaccard: Jaccard similarity of the sets, 0 to 1.
        bands: number of bands.
        rows: minima in each band.
    """
    return float(1 - (1 - jaccard**rows) ** bands)


def signature(values: UInt64s) -> UInt64s:
    """Computes the signature of a set of hashes.

    Args:
        values: the hashes, shape (n,) uint64.

    Returns:
        128 minima, one for each hash function, shape (128,) uint64.
    """
    minhash = _empty().copy()
    for start in range(0, len(values), _SLICE):
        minhash.update_batch(values[start : start + _SLICE].tolist())
    minima: UInt64s = minhash.hashvalues
    return minima


@functools.cache
def _empty() -> "MinHash":
    from datasketch import MinHash

    # The identity: values are hashes already.
    return MinHash(N_HASHES, seed=1, scheme="affine64", hashfunc=int)


def buckets(values: UInt64s, threshold: float) -> list[int]:
    """The buckets of a set, one for each band, as signed 64-bit integers; the band is part of the bucket.

    Args:
        values: hashes of the set, at least one; repetitions do not count.
        threshold: Jaccard similarity.
    """
    bands, rows = bands_of(threshold)
    minima = signature(values).astype("<u8")
    parts = (band.to_bytes(2) + minima[band * rows : (band + 1) * rows].tobytes() for band in range(bands))
    return [int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little", signed=True) for part in parts]
