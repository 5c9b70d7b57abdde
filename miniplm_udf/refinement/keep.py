"""Which rows a corpus keeps: the config's `select` over ranked candidates, exactly. Driver only, no torch.

    candidates (instance_id, source, score, n_tokens) + SelectConfig -> budgets -> `SelectionCuts` (selection.py)

The ratio alpha is of the candidates, which are the pool rows that pass `where`: floor(alpha * N) instances, or
instances of at most floor(alpha * T) tokens in rank order; with `per_source`, for each source. A band is what one cut
keeps and a higher cut does not. A score that is null, NaN or infinite counts among the candidates and is never kept.
The cuts suffice to choose the same rows again, so they go into the provenance. A retry counts again and finds the same.
"""

import dataclasses
import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from miniplm_udf.config.refine import SelectConfig, parse_tokens
from miniplm_udf.errors import CorpusError
from miniplm_udf.refinement.selection import (
    ALL,
    BUCKETS_PER_UNIT,
    BUCKETS_PER_UNIT_OF_A_SOURCE,
    Cut,
    RankedFrame,
    budget_of,
    find_cuts,
    is_finite,
    keep_condition,
)
from miniplm_udf.store.provenance import PlainCuts

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

LOGGER = logging.getLogger("miniplm.refine")


@dataclasses.dataclass(frozen=True)
class SelectionCuts:
    """The cuts of a selection, by source, or under `ALL` for all sources together.

    Attributes:
        down_to: the last kept row; a source without an entry keeps nothing.
        below: the last row above the band, if a band is kept.
        per_source: whether the keys are sources.
    """

    down_to: Mapping[str, Cut]
    below: Mapping[str, Cut] = dataclasses.field(default_factory=dict)
    per_source: bool = False

    def mark(self, rows: "DataFrame") -> "DataFrame":
        """Marks the rows that the cuts keep.

        Args:
            rows: a frame with `score` and `instance_id`, and with `source` if the cuts are per source.

        Returns:
            The rows with a further column `is_kept`, true or false; false for a score that is null, NaN or infinite.
        """
        from pyspark.sql import functions as F

        if not self.per_source:
            kept = F.lit(False) if ALL not in self.down_to else keep_condition(self.down_to[ALL])
            above = keep_condition(self.below[ALL]) if ALL in self.below else F.lit(False)
            return rows.withColumn("is_kept", is_finite() & kept & ~above)
        marked = rows.join(F.broadcast(self._frame(rows)), F.col("source") == F.col("cut_source"), "left")
        kept = F.coalesce(_keeps("down_to") & ~F.coalesce(_keeps("below"), F.lit(False)), F.lit(False))
        return marked.withColumn("is_kept", is_finite() & kept).select(*rows.columns, "is_kept")

    def _frame(self, rows: "DataFrame") -> "DataFrame":
        """One row for each source that keeps something."""
        values = [
            (source, cut.score, cut.instance_id, *_values(self.below.get(source)))
            for source, cut in self.down_to.items()
        ]
        columns = "cut_source string, down_to_score double, down_to_id string, below_score double, below_id string"
        return rows.sparkSession.createDataFrame(values, columns)

    def plain(self) -> PlainCuts:
        """The cuts as the provenance holds them.

        Returns:
            By source (or "all sources"): `down_to` and, for a band, `below`, each [score, instance_id or None].
        """
        cuts = {"down_to": self.down_to, "below": self.below}
        return {
            source if self.per_source else "all sources": {
                name: list(_values(by_source[source])) for name, by_source in cuts.items() if source in by_source
            }
            for source in sorted(self.down_to)
        }


def _values(cut: Cut | None) -> tuple[float | None, str | None]:
    return (None, None) if cut is None else (cut.score, cut.instance_id)


def _keeps(name: str) -> "Column":
    """`selection.keep_condition` for a cut in the columns `<name>_score` and `<name>_id`; null without a cut."""
    from pyspark.sql import functions as F

    score, last_id, cut_score = F.col("score"), F.col(f"{name}_id"), F.col(f"{name}_score")
    return (score > cut_score) | ((score == cut_score) & (last_id.isNull() | (F.col("instance_id") <= last_id)))


def choose(candidates: "DataFrame", select: SelectConfig, place: str) -> SelectionCuts:
    """Finds the cuts of a selection, mostly in two or three passes over the columns of the score.

    Args:
        candidates: instance_id, source, score, n_tokens.
        select: the selection.
        place: place of the corpus in the config, for messages.

    Returns:
        The cuts.

    Raises:
        CorpusError: the config gives a share to a source that no candidate has.
    """
    from pyspark.sql import functions as F

    if select.rule == "threshold":
        return SelectionCuts({ALL: Cut(float(select.threshold or 0.0))})
    group = F.lit(ALL) if select.per_source is None else F.col("source")
    weight = [F.col("n_tokens").alias("weight")] if select.counts_tokens else []
    ranked = RankedFrame(candidates.select(group.alias("group"), "instance_id", "score", *weight))
    buckets, totals = ranked.tally(BUCKETS_PER_UNIT if select.per_source is None else BUCKETS_PER_UNIT_OF_A_SOURCE)
    if isinstance(select.per_source, dict) and set(select.per_source) - set(totals):
        raise CorpusError(
            f"{place}.select.per_source: expected sources of the candidates, {sorted(totals)}, "
            f"found {sorted(set(select.per_source) - set(totals))}"
        )
    budgets = budgets_of(select, totals)
    down_to = find_cuts(ranked, buckets, budgets)
    if select.rule != "band":
        return SelectionCuts(down_to, per_source=select.per_source is not None)
    above = {source: budget_of(1 - Fraction(str(select.high)), total) for source, total in totals.items()}
    below = find_cuts(ranked, buckets, {source: budget for source, budget in above.items() if budget})
    return SelectionCuts(down_to, below, per_source=select.per_source is not None)


def budgets_of(select: SelectConfig, totals: Mapping[str, int]) -> dict[str, int]:
    """How much each group may keep, in instances or tokens; for a band, how much lies above its lower quantile.

    Args:
        select: the selection.
        totals: instances, or tokens, of all candidates by group.

    Returns:
        Budgets by group.
    """
    whole = sum(totals.values())
    budget = None if select.budget_tokens is None else parse_tokens(select.budget_tokens)
    if budget is not None and budget > whole:
        LOGGER.warning("refine: a budget of %d tokens is more than the %d tokens of the candidates", budget, whole)
    if isinstance(select.per_source, dict):
        shared = budget if budget is not None else budget_of(float(select.ratio or 0), whole)
        return {source: budget_of(share, shared) for source, share in select.per_source.items()}
    if budget is not None:
        return {group: budget * total // whole for group, total in totals.items() if whole}
    ratio = 1 - Fraction(str(select.low)) if select.rule == "band" else Fraction(str(select.ratio))
    return {group: budget_of(ratio, total) for group, total in totals.items()}
