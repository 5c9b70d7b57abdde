"""Spearman's correlation from joint counts against ranks of all rows, its bound, and the notes."""

import math
import random
from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.refinement.diagnostics import kept_share_by_length, notes
from miniplm_udf.refinement.pair import compare_losses, pair_notes, spearman
from miniplm_udf.store.provenance import PairNumbers
from tests.support.selection_oracles import exact


def joint(rows: list[tuple[float, float]], width: float) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for a, b in rows:
        key = (math.floor(a / width), math.floor(b / width))
        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.3, 3.0])
def test_the_correlation_of_buckets_is_within_its_bound(slope: float) -> None:
    rng = random.Random(slope)
    rows = [(x, slope * x + rng.gauss(0, 1)) for x in (rng.gauss(0, 1) for _ in range(2000))]
    truth = exact(rows)
    errors = []
    for width in (0.5, 0.1, 0.02):
        estimate = spearman(joint(rows, width))
        assert estimate is not None
        assert abs(estimate[0] - truth) <= estimate[1]
        errors.append(estimate[1])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05
    # One row a bucket: exact, ties too.
    whole = [(round(a * 2), round(b * 2)) for a, b in rows]
    estimate = spearman(joint(whole, 1))
    assert estimate is not None
    assert estimate[0] == pytest.approx(exact(whole), abs=1e-12)


def test_one_bucket_has_no_correlation() -> None:
    assert spearman({(1, 1): 5, (1, 2): 3}) is None
    assert spearman({}) is None
    assert spearman({(1, 1): 1, (2, 2): 1}) == (pytest.approx(1.0), pytest.approx(0.0))


def sums(**lengths: tuple[int, int]) -> list[dict[str, int]]:
    return [{"length": int(k[1:]), "n_kept": kept, "n_rows": n} for k, (kept, n) in lengths.items()]


def test_the_kept_share_by_length_names_tokens() -> None:
    shares = kept_share_by_length([*sums(k5=(1, 4), k6=(2, 2)), *sums(k5=(1, 4))])  # type: ignore[arg-type]
    assert shares == {"32-63": 0.25, "64-127": 1.0}


def pair_of(with_teacher: float, with_reference: float) -> PairNumbers:
    return {
        "teacher": "teacher", "reference": "reference", "spread": {"teacher": 0.9, "reference": 0.4},
        "spearman_with_minus_teacher_loss": with_teacher, "spearman_with_reference_loss": with_reference,
        "spread_unit": "nats/token", "context_gain": {"teacher": 0.31},
    }  # fmt: skip


def test_notes_name_a_poor_pair_and_a_poor_rule() -> None:
    config = ExperimentConfig(root="/tmp/x", models={a: ModelConfig(path="/n") for a in ("teacher", "reference")})
    difference = CorpusConfig(score="reference_nll_mean - teacher_nll_mean")
    total = CorpusConfig(score="reference_nll_sum_nats - teacher_nll_sum_nats")

    def noted(corpus: CorpusConfig, rho: float, of: Any) -> list[str]:
        return notes(config, corpus, pair_of(0.1, rho), of)

    assert ["too strong for this reference" in note for note in noted(difference, 0.95, sums(k5=(1, 9)))] == [True]
    assert noted(difference, 0.6, sums(k5=(1, 9), k6=(1, 9))) == []
    # The reference alone is its loss: that says nothing of the teacher.
    assert noted(CorpusConfig(score="reference_nll_mean"), 1.0, sums(k5=(1, 9))) == []
    assert ["lengths vary" in note for note in noted(total, 0.1, sums(k5=(1, 9), k6=(1, 9)))] == [True]
    assert noted(total, 0.1, sums(k5=(1, 99), k6=(1, 1))) == []


def test_a_reference_that_adds_nothing_is_said_to_in_one_sentence() -> None:
    (note,) = pair_notes(pair_of(0.88, 0.04))
    assert "minus the loss of teacher alone does (Spearman 0.880, and 0.040 with the loss of reference" in note
    assert "spreads: reference 0.40, teacher 0.90 nats/token; gain in the second half of a text: teacher 0.31" in note
    assert "train it longer" in note
    assert "filter repetition in `where`" in note
    # A corpus that filters repetition is not told to.
    (note,) = pair_notes(pair_of(0.88, 0.04), "coalesce(duplicate_5gram_share, 0) <= 0.15")
    assert "filter repetition" not in note
    assert pair_notes(pair_of(0.6, 0.5)) == []


def test_losses_of_a_sample_are_compared_with_their_difference() -> None:
    rng = random.Random(3)
    teacher = [rng.gauss(3, 1) for _ in range(300)]
    flat = [3.5 + 0.05 * rng.gauss(0, 1) for _ in teacher]
    pair = compare_losses(teacher, flat, context_gain={"teacher": 0.2})
    assert pair is not None
    differences = [r - t for t, r in zip(teacher, flat, strict=True)]
    expected = exact([(d, -t) for d, t in zip(differences, teacher, strict=True)])
    assert pair["spearman_with_minus_teacher_loss"] == pytest.approx(expected)
    assert pair["spearman_with_reference_loss"] == pytest.approx(exact(list(zip(differences, flat, strict=True))))
    assert pair["spread"]["reference"] < 0.1 < pair["spread"]["teacher"]
    assert ["adds nothing" in note for note in pair_notes(pair)] == [True]
    # The other way round, the teacher adds nothing.
    swapped = compare_losses(flat, teacher)
    assert swapped is not None
    assert ["too strong" in note for note in pair_notes(swapped)] == [True]
    assert compare_losses([1.0, 1.0], [2.0, 2.0]) is None
