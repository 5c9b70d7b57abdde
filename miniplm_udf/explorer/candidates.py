"""The candidates of a version of a corpus in DuckDB: kept or dropped, with their scores and distance to the cut.

Inputs: `corpora`, `refined/<name>`, `score_matrix` or `proxy_scores` at the version that the corpus was made from,
`annotations`, `instances`, read by delta-rs. Output: one local DuckDB file in a temporary folder, one row per candidate
without its text; texts are read from `instances` for the rows that are shown, or searched. The recorded `where` and
`score` are Spark SQL, which sqlglot translates. Scores are nats per token unless the corpus has its own expression.
Driver only; no Spark. Writes nothing under the root; a retry reads everything again.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from miniplm_udf.config import rules
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig
from miniplm_udf.corpora import listing
from miniplm_udf.errors import CorpusError
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_files, delta_log

if TYPE_CHECKING:
    import duckdb
    import pyarrow.dataset as ds

ROWS_PER_PAGE = 20
TEXT_CHARACTERS = 1500
_MEAN = "_nll_mean"
# The candidates are the rows of the first of these that a corpus has.
_CANDIDATE_VIEWS = ("predicted", "matrix", "annotations", "instances")
ORDERS = {
    "cut": "abs(cut_distance) nulls last, instance_id",
    "highest": "score desc, instance_id",
    "lowest": "score, instance_id",
    "random": "hash(instance_id), instance_id",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filter:
    """The candidates that a reader wants to see.

    Attributes:
        source: only this source; empty: all sources.
        low, high: bounds of the score, inclusive; None: no bound.
        text: only texts that contain this, in upper or lower case; empty: all texts.
        order: a key of `ORDERS`.
        page: number of the page, from 0.
    """

    source: str = ""
    low: float | None = None
    high: float | None = None
    text: str = ""
    order: str = "cut"
    page: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The rows of a page that were kept, or those that were dropped, and the number of all that match."""

    n_matching: int
    rows: Sequence[TableRow]


class ExploredCorpus:
    """A version of a corpus, opened for looking.

    Attributes:
        name, version: the version.
        cut: the lowest kept score; None for a random corpus, whose score does not decide.
        score: the expression of the score.
        sources: candidates by source, the largest first.
    """

    def __init__(self, config: ExperimentConfig, address: str, database: str) -> None:
        """Reads the candidates into a DuckDB file.

        Args:
            config: the experiment.
            address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.
            database: path of the file; it must not exist.

        Raises:
            CorpusError: there is no such version, or its candidates cannot be computed without Spark.
        """
        import duckdb

        shown = listing.show(config.root, address)
        self.name, self.version = shown["name"], shown["version"]
        recorded = shown["config"]
        is_random = recorded["select"]["rule"] == "random"
        # The resolved score of a random corpus is the draw.
        corpus = config.refine.corpora.get(self.name, CorpusConfig())
        self.score = rules.plain_score(corpus) if is_random else str(recorded["score"])
        self.cut = None if is_random else float(shown["threshold"])
        self._connection = duckdb.connect(database)
        self._datasets: dict[str, ds.Dataset] = {}
        if recorded.get("candidates") == "proxy_scores":
            self._register("predicted", config.layout.table("proxy_scores"), shown["inputs"].get("proxy_version"))
        self._register("matrix", config.layout.table("score_matrix"), shown["inputs"].get("matrix_version"))
        uri = config.layout.pinned(self.name, self.version) if shown["pinned"] else config.layout.refined(self.name)
        self._register("kept", uri, None if shown["pinned"] else self.version)
        self._register("instances", config.layout.table("instances"), None)
        if delta_log.has_commits(config.layout.table("annotations")):
            self._register("annotations", config.layout.table("annotations"), None)
        self._create(str(recorded["where"]), recorded["select"])
        counts = self._connection.execute("select source, count(*) from candidates group by 1 order by 2 desc, 1")
        self.sources: dict[str, int] = dict(counts.fetchall())

    def _needs_spark(self, reason: str) -> CorpusError:
        return CorpusError(
            f"{self.name}@{self.version} cannot be explored without Spark: {reason}; use `miniplm inspect {self.name}`"
        )

    def _register(self, view: str, uri: str, version: int | None) -> None:
        from deltalake.exceptions import DeltaError

        try:
            table = delta_files.open_table(uri, version).to_pyarrow_dataset()
        except DeltaError as error:
            raise CorpusError(f"{self.name}@{self.version}: {str(error).splitlines()[0]}") from error
        self._connection.register(view, table)
        self._datasets[view] = table

    def _create(self, where: str, select: Json) -> None:
        """Creates the table `candidates`."""
        import duckdb
        import sqlglot
        from sqlglot.errors import SqlglotError

        means = [column for column in self._columns("matrix") if column.endswith(_MEAN)]
        by_source = "partition by source" if select.get("per_source") is not None else ""
        # A band also has an upper cut.
        nearest = "if(score - high < low - score or score < low, score - low, score - high)"
        distance = nearest if select["rule"] == "band" else "score - low"
        try:
            condition, score = (
                sqlglot.transpile(text, read="spark", write="duckdb")[0] for text in (where, self.score)
            )
            self._connection.execute(
                f"""
                create table candidates as
                with scored as (
                  select instance_id, source, {", ".join(means)}, cast({score} as double) as score,
                    instance_id in (select instance_id from kept) as kept
                  from {self._joined(where, self.score)} where split = 'pool' and ({condition})
                ), cuts as (
                  select *, min(score) filter (kept) over ({by_source}) as low,
                    max(score) filter (kept) over ({by_source}) as high
                  from scored where isfinite(score)
                )
                select * exclude (low, high), {distance if self.cut is not None else "null::double"} as cut_distance
                from cuts
                """
            )
        except (SqlglotError, duckdb.Error) as error:
            raise self._needs_spark(f"DuckDB cannot compute its candidates ({str(error).splitlines()[0]})") from error

    def _joined(self, *expressions: str) -> str:
        """The table of the candidates, with the columns of the other tables that the page shows or a rule names."""
        first, *others = (view for view in _CANDIDATE_VIEWS if view in self._datasets)
        joined, seen = first, set(self._columns(first))
        for view in others:
            own = [name for name in self._columns(view) if name not in seen and _is_needed(name, expressions)]
            seen.update(own)
            if own:
                joined += f" left join (select instance_id, {', '.join(own)} from {view}) using (instance_id)"
        return joined

    def _columns(self, view: str) -> list[str]:
        return list(self._datasets[view].schema.names) if view in self._datasets else []

    def side(self, wanted: Filter, side: Literal["kept", "dropped"]) -> Side:
        """Returns one page of one side.

        Args:
            wanted: which candidates, in which order.
            side: kept or dropped.

        Returns:
            The rows, each with `instance_id`, `source`, `score`, `kept`, `cut_distance`, `<alias>_nll_mean`, the
            beginning of its `text` and `n_characters`.
        """
        # Requests come on several threads, and a cursor does not see what its connection registered.
        cursor = self._connection.cursor()
        cursor.register("instances", self._datasets["instances"])
        condition, values = _condition(wanted, side)
        matching = cursor.execute(f"select count(*) from candidates where {condition}", values).fetchone()
        chosen = cursor.execute(
            f"select * from candidates where {condition} order by {ORDERS[wanted.order]} limit ? offset ?",
            [*values, ROWS_PER_PAGE, wanted.page * ROWS_PER_PAGE],
        )
        names = [column[0] for column in chosen.description or []]
        rows = [dict(zip(names, row, strict=True)) for row in chosen.fetchall()]
        texts = self._texts(cursor, [row["instance_id"] for row in rows])
        shown = [{**row, **texts.get(row["instance_id"], {"text": "", "n_characters": 0})} for row in rows]
        return Side(n_matching=matching[0] if matching else 0, rows=shown)

    def _texts(self, cursor: "duckdb.DuckDBPyConnection", ids: Sequence[str]) -> dict[str, TableRow]:
        places = ", ".join("?" * len(ids)) or "null"
        beginning = f"text[1:{TEXT_CHARACTERS}]"
        rows = cursor.execute(
            f"select instance_id, {beginning}, length(text) from instances where instance_id in ({places})", ids
        )
        return {key: {"text": text, "n_characters": length} for key, text, length in rows.fetchall()}

    def close(self) -> None:
        """Closes the database."""
        self._connection.close()


def _is_needed(column: str, expressions: Sequence[str]) -> bool:
    return column.endswith(_MEAN) or any(re.search(rf"\b{column}\b", text) for text in expressions)


def _condition(wanted: Filter, side: str) -> tuple[str, list[Any]]:
    """The condition in SQL, and the values of its places."""
    parts: list[tuple[str, list[Any]]] = [("kept" if side == "kept" else "not kept", [])]
    if wanted.source:
        parts.append(("source = ?", [wanted.source]))
    for bound, comparison in ((wanted.low, ">="), (wanted.high, "<=")):
        if bound is not None and math.isfinite(bound):
            parts.append((f"score {comparison} ?", [bound]))
    if wanted.text:
        search = "select instance_id from instances where contains(lower(text), lower(?))"
        parts.append((f"instance_id in ({search})", [wanted.text]))
    return " and ".join(part for part, _ in parts), [value for _, values in parts for value in values]
