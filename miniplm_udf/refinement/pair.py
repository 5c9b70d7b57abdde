"""Compares a score with the losses of its two models: rank correlations, spreads, and a sentence that says what to do.

    difference = loss(reference) - loss(teacher)

If the reference gives all texts nearly the same loss, the difference ranks as minus the loss of the teacher alone. If
the teacher does so, it ranks as the loss of the reference alone. Input: losses of candidates, from a Spark frame
(`diagnostics.py`) or as lists of a sample (`compare_losses`). Output: `PairNumbers` and sentences. Pure, without Spark;
Spearman's correlation comes from joint counts in buckets, with a bound on its error.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from miniplm_udf.store.provenance import PairNumbers

# From this correlation on, the score says little more than the loss of one model alone.
TOO_NEAR = 0.85
REPETITION_COLUMNS = ("duplicate_5gram_share", "duplicate_line_share", "duplicate_line_character_share")


def compare_losses(
    teacher: Sequence[float], reference: Sequence[float], unit: str = "nats/token", *,
    aliases: tuple[str, str] = ("teacher", "reference"), context_gain: Mapping[str, float] | None = None,
) -> PairNumbers | None:  # fmt: skip
    """Compares the difference of two models' losses on a sample of texts with the loss of each model alone.

    Args:
        teacher: mean loss of the teacher on each text.
        reference: mean loss of the reference on the same texts, in the same unit.
        unit: unit of the losses, nats/token or nats/byte.
        aliases: aliases of the teacher and of the reference.
        context_gain: by alias, nats per byte by which the second half of a text has a lower loss than its first half.

    Returns:
        The numbers, exact; None if the losses or their differences are all equal.
    """
    differences = [r - t for t, r in zip(teacher, reference, strict=True)]
    with_teacher = spearman(_joint(differences, [-loss for loss in teacher]))
    with_reference = spearman(_joint(differences, reference))
    if with_teacher is None or with_reference is None:
        return None
    spread = {aliases[0]: statistics.pstdev(teacher), aliases[1]: statistics.pstdev(reference)}
    return {
        "teacher": aliases[0],
        "reference": aliases[1],
        "spearman_with_minus_teacher_loss": with_teacher[0],
        "spearman_with_reference_loss": with_reference[0],
        "spread": spread,
        "spread_unit": unit,
        "context_gain": dict(context_gain or {}),
    }


def pair_notes(pair: PairNumbers, where: str = "") -> list[str]:
    """Returns the sentence that says what to do about a pair of models; none if the difference says more than either.

    Args:
        pair: the numbers of the pair.
        where: the condition of the corpus; repetition that it filters already is not advised again.
    """
    teacher, reference = pair["teacher"], pair["reference"]
    with_teacher, with_reference = pair["spearman_with_minus_teacher_loss"], pair["spearman_with_reference_loss"]
    spreads = f"spreads: {reference} {pair['spread'][reference]:.2f}, {teacher} {pair['spread'][teacher]:.2f} "
    spreads += pair["spread_unit"]
    if with_teacher >= TOO_NEAR and with_teacher >= with_reference:
        filters = any(column in where for column in REPETITION_COLUMNS)
        return [
            f"the score ranks almost as minus the loss of {teacher} alone does (Spearman {with_teacher:.3f}, and "
            f"{with_reference:.3f} with the loss of {reference}; {spreads}{_gains(pair)}): the reference adds nothing; "
            "train it longer (reference.train.steps) or larger (reference.architecture)"
            + ("" if filters else ", or filter repetition in `where` by the annotations (docs/cleaning.md)")
        ]
    if with_reference >= TOO_NEAR:
        return [
            f"the score ranks almost as the loss of {reference} alone does (Spearman {with_reference:.3f}, and "
            f"{with_teacher:.3f} with minus the loss of {teacher}; {spreads}{_gains(pair)}): the teacher is too strong "
            "for this reference; train a larger reference, or take a smaller teacher"
        ]
    return []


def _gains(pair: PairNumbers) -> str:
    gains = ", ".join(f"{alias} {gain:.2f}" for alias, gain in pair["context_gain"].items())
    return f"; gain in the second half of a text: {gains} nats/byte" if gains else ""


def _joint(first: Sequence[float], second: Sequence[float]) -> dict[tuple[int, int], int]:
    """Counts of rows by the numbers of their two values in the order of the distinct values."""
    numbers = [{value: number for number, value in enumerate(sorted(set(side)))} for side in (first, second)]
    counts: dict[tuple[int, int], int] = {}
    for a, b in zip(first, second, strict=True):
        key = (numbers[0][a], numbers[1][b])
        counts[key] = counts.get(key, 0) + 1
    return counts


def spearman(joint: Mapping[tuple[int, int], int]) -> tuple[float, float] | None:
    """Spearman's correlation of two rankings of which only the buckets are known, and a bound on its error.

    Let e and f be the differences of the ranks from the mean ranks of their buckets. Then |cov(R, S) - cov(R', S')| is
    at most sd R' sd f + sd e sd S' + sd e sd f, and var e is at most (n^2 - 1) / 12 in a bucket of n rows.

    Args:
        joint: number of rows by (bucket in the first ranking, bucket in the second); higher buckets rank higher.

    Returns:
        The correlation and the bound; None if all rows are in one bucket of either ranking.
    """
    (first, first_sd, first_hidden), (second, second_sd, second_hidden) = (_ranks(joint, side) for side in (0, 1))
    if not first_sd or not second_sd:
        return None
    n_rows = sum(joint.values())
    covariance = math.fsum(n * first[a] * second[b] for (a, b), n in joint.items()) / n_rows
    correlation = covariance / (first_sd * second_sd)
    error = first_hidden / first_sd + second_hidden / second_sd
    error += (first_hidden * second_hidden) / (first_sd * second_sd)
    shrink = first_sd * second_sd / (math.hypot(first_sd, first_hidden) * math.hypot(second_sd, second_hidden))
    return correlation, min(error + abs(correlation) * (1 - shrink), 2.0)


def _ranks(joint: Mapping[tuple[int, int], int], side: int) -> tuple[dict[int, float], float, float]:
    """Mean ranks of one ranking's buckets.

    Returns:
        By bucket, its mean rank minus the mean rank of all rows; the standard deviation of these over all rows; and the
        largest possible standard deviation of ranks within their buckets.
    """
    sizes: dict[int, int] = {}
    for key, n in joint.items():
        sizes[key[side]] = sizes.get(key[side], 0) + n
    n_rows, before = sum(sizes.values()), 0
    ranks: dict[int, float] = {}
    for bucket in sorted(sizes):
        ranks[bucket] = before + (sizes[bucket] - n_rows) / 2
        before += sizes[bucket]
    if not n_rows:
        return {}, 0.0, 0.0
    between = math.fsum(n * ranks[bucket] ** 2 for bucket, n in sizes.items()) / n_rows
    within = math.fsum(n * (n * n - 1) / 12 for n in sizes.values()) / n_rows
    return ranks, math.sqrt(between), math.sqrt(within)
