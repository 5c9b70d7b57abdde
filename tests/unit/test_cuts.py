"""The pure parts of following: counts that merge, the cut that they give, and the command's options."""

import math
import random
from pathlib import Path

import pytest

from jobs import cli
from miniplm_udf.config.refine import SelectConfig
from miniplm_udf.refinement.cuts import BucketCut, Counted, cut_of, lower_edge, merged, totals
from miniplm_udf.refinement.selection import UNUSABLE

COUNTS = {5: (3, 30), 4: (4, 10), -2: (2, 20), UNUSABLE: (1, 7)}
CONF = Path(__file__).resolve().parents[2] / "conf"


def ratio(share: float, by: str = "instances") -> SelectConfig:
    return SelectConfig(ratio=share, by=by)  # type: ignore[arg-type]


def test_counts_merge_in_any_order_and_grouping() -> None:
    rng = random.Random(0)
    parts = [{rng.randint(-3, 3): (rng.randint(0, 9), rng.randint(0, 99)) for _ in range(4)} for _ in range(5)]
    forwards, backwards = Counted("c", "q", -1, {}), Counted("c", "q", -1, {})
    for number, part in enumerate(parts):
        forwards = forwards.plus(part, number)
        backwards = backwards.plus(parts[-1 - number], number)
    assert forwards == backwards
    assert forwards.through == 4
    assert totals(forwards.counts) == tuple(sum(totals(part)[i] for part in parts) for i in (0, 1))
    assert merged({1: (1, 2)}, {}) == merged({}, {1: (1, 2)}) == {1: (1, 2)}


# alpha of 10 candidates: the number of the lowest bucket that is kept, what is within, rows of the bucket of the cut.
@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.1, (6, 0, 3)),  # one of three fits: none is kept
        (0.2, (5, 3, 3)),  # two of three: all are
        (0.3, (5, 3, 4)),
        (0.5, (5, 3, 4)),  # two of four is not more than half
        (0.6, (4, 7, 4)),
        (0.7, (4, 7, 2)),
        (0.9, (-2, 9, 0)),
        (1.0, (-2, 9, 0)),  # a score that is no number is never kept
    ],
)
def test_the_cut_keeps_whole_buckets(share: float, expected: tuple[int, int, int]) -> None:
    cut = cut_of(COUNTS, ratio(share))
    assert (cut.bucket, cut.n_within, cut.boundary_rows) == expected
    assert cut.budget == math.floor(share * 10 + 1e-9)
    assert abs(cut.n_within - min(cut.budget, 9)) <= cut.boundary_rows / 2


def test_the_cut_counts_tokens_where_the_rule_does() -> None:
    # The budget is 33 of 67 tokens: the first bucket's 30, and less than half of the second's 10.
    assert cut_of(COUNTS, ratio(0.5, "tokens")) == BucketCut(5, lower_edge(5), 33, 30, 4)
    assert cut_of(COUNTS, ratio(0.55, "tokens")) == BucketCut(4, lower_edge(4), 36, 40, 4)


def test_a_threshold_is_the_cut_and_no_candidate_no_cut() -> None:
    cut = cut_of({1: (4, 9), 0: (2, 5)}, SelectConfig(rule="threshold", threshold=-0.25))
    assert (cut.bucket, cut.score, cut.n_within, cut.boundary_rows) == (1, -0.25, 4, 0)
    assert cut_of({UNUSABLE: (3, 9)}, ratio(0.5)).bucket > UNUSABLE
    assert cut_of({}, ratio(0.5)).n_within == 0


def test_buckets_begin_where_their_number_says() -> None:
    edges = [lower_edge(bucket) for bucket in range(-20_000, 20_000, 7)]
    assert edges == sorted(set(edges))
    assert lower_edge(0) == 0
    assert lower_edge(-8000) == -lower_edge(8000)
    # A thousandth of the score wide, above a hundredth.
    assert all(lower_edge(b + 1) / lower_edge(b) - 1 < 1.1 / 1000 for b in range(2500, 15_000))


def test_follow_is_an_option_of_refine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["refine", "-c", str(CONF / "demo.yaml"), f"root={tmp_path}/root"]
    assert cli.main([*common, "--follow", "--corpus", "difference", "--dry-run"]) == 0
    assert '"root"' in capsys.readouterr().out
    assert cli.main([*common, "--corpus", "difference"]) == 2
    assert "expected together with --follow" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["refine", "--rules"])
    assert ended.value.code == 0
    assert "color_filter: CoLoR-Filter" in capsys.readouterr().out
    assert not (tmp_path / "root").exists()
