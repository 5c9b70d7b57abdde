"""Versions of corpora as a reader without a JVM sees them: listed, shown by source, and compared.

Input: a root, and a version as `NAME`, `NAME@NUMBER` or `NAME@TAG` of a pin. Output: plain data. Reads the tables
`corpora` and `pins` whole, and of `refined/<name>`, `pinned/<name>/<version>` and `instances` the files of one version
(delta-rs) in batches of the needed columns (pyarrow), so memory does not grow with the corpus. Writes nothing, so a
retry reads again. Driver only; commands that change versions use Spark (versions.py).
"""

import contextlib
import heapq
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec

from miniplm_udf import storage
from miniplm_udf.corpora.shown import CountsBySource, ListedVersion, ShownInstance, ShownVersion, VersionDifference
from miniplm_udf.errors import CorpusError, VersionGoneError
from miniplm_udf.layout import Root
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.store import corpus_records, delta_files, delta_log
from miniplm_udf.store.pins import Pin
from miniplm_udf.store.provenance import RecordedInputs

if TYPE_CHECKING:
    import pyarrow as pa

_TEXT_CHARACTERS = 240
_BATCH_ROWS = 65_536
# Ids that a comparison holds at once, about 200 bytes each; with more, it reads the versions several times.
_IDS_AT_ONCE = 2_000_000


def find(root: str, address: str) -> tuple[str, int]:
    """Finds the name and the number of a version.

    Args:
        root: URI of the root.
        address: `NAME` (its newest version), `NAME@NUMBER` or `NAME@TAG`.

    Returns:
        The name of the corpus and the number of the version.

    Raises:
        CorpusError: there is no such corpus, version or tag.
    """
    name, version = corpus_records.parse_address(address, lambda: _pins(root))
    return name, int(corpus_records.choose_version(_corpora(root), name, version)["version"])


def listing(root: str) -> list[ListedVersion]:
    """Returns all versions by name and number.

    Args:
        root: path or URI of the root.

    Raises:
        CorpusError: there is no table `corpora`.
    """
    tags = {(pin.name, pin.version): pin.tag or "yes" for pin in _pins(root)}
    return [
        {
            "name": row["name"],
            "version": row["version"],
            "created_at": row["created_at"],
            "n_instances": row["n_instances"],
            "n_tokens": row["n_tokens"],
            "threshold": row["threshold"],
            "fingerprint": row["fingerprint"],
            "made_by": _made_by(row["inputs"]),
            "pinned": tags.get((row["name"], row["version"])),
        }
        for row in map(corpus_records.parsed, _corpora(root))
    ]


def _made_by(inputs: RecordedInputs) -> str:
    if derived := inputs.get("derived"):
        return derived["by"]
    return "follow" if inputs.get("followed") else "refine"


def show(root: str, address: str) -> ShownVersion:
    """Returns the full provenance of a version, and its rows counted by source.

    Args:
        root: URI of the root.
        address: the version, as in `find`.

    Raises:
        CorpusError: there is no such version, or its files cannot be read without Spark.
    """
    name, number = find(root, address)
    pin = next((pin for pin in _pins(root) if (pin.name, pin.version) == (name, number)), None)
    row = corpus_records.parsed(corpus_records.choose_version(_corpora(root), name, number))
    by_source = None
    with contextlib.suppress(VersionGoneError):
        by_source = _Version(root, name, number, pin is not None).by_source()
    return {**row, "pinned": pin is not None, "tag": pin.tag if pin else None, "by_source": by_source}


def diff(root: str, before: str, after: str, n_examples: int) -> VersionDifference:
    """Compares two versions, of one corpus or of two, by instance ids.

    Args:
        root: URI of the root.
        before, after: addresses; rows that only `after` has were added.
        n_examples: texts to show of the added and of the removed rows, beginning with the highest score.

    Returns:
        The counts of added, removed and common rows by source, and examples.

    Raises:
        CorpusError: there is no such version, its rows are gone, or its files cannot be read without Spark.
    """
    places = [find(root, address) for address in (before, after)]
    pinned = {(pin.name, pin.version) for pin in _pins(root)}
    old, new = (_Version(root, name, number, (name, number) in pinned) for name, number in places)
    n_parts = -(-(old.n_rows + new.n_rows) // _IDS_AT_ONCE) or 1
    added, removed, both = _Rows(n_examples), _Rows(n_examples), _Rows(0)
    for low, high in _id_ranges(n_parts):
        old_rows, new_rows = old.rows(low, high), new.rows(low, high)
        is_old = _is_in(new_rows, old_rows)
        both.add(new_rows.filter(is_old))
        added.add(_without(new_rows, is_old))
        removed.add(_without(old_rows, _is_in(old_rows, new_rows)))
    chosen = [row.instance_id for rows in (added, removed) for row in rows.examples]
    texts = _texts(root, chosen)
    return {
        "from": f"{old.name}@{old.number}",
        "to": f"{new.name}@{new.number}",
        "added": added.by_source(),
        "removed": removed.by_source(),
        "both": both.by_source(),
        "added_examples": added.with_texts(texts),
        "removed_examples": removed.with_texts(texts),
    }


def _corpora(root: str) -> list[TableRow]:
    """The rows of `corpora` by name and version; `created_at` in UTC, without a zone."""
    uri = Root(root).table("corpora")
    if not delta_log.has_commits(uri):
        raise CorpusError(
            f"table {storage.redact(uri)}: expected a Delta table, found none; run the stage that writes it first"
        )
    rows = [{**row, "created_at": row["created_at"].replace(tzinfo=None)} for row in _read(uri)]
    return sorted(rows, key=lambda row: (row["name"], row["version"]))


def _pins(root: str) -> list[Pin]:
    uri = Root(root).table("pins")
    rows = _read(uri) if delta_log.has_commits(uri) else []
    return sorted((Pin(**row) for row in rows), key=lambda pin: (pin.name, pin.version))


def _read(uri: str) -> list[TableRow]:
    """All rows of a small table."""
    import pyarrow.parquet as pq
    from deltalake.exceptions import DeltaError

    rows: list[TableRow] = []
    try:
        for file in delta_files.parquet_files(uri):
            with fsspec.open(file, "rb") as handle:
                rows += pq.ParquetFile(handle).read().to_pylist()
    except (DeltaError, OSError) as error:
        raise _unreadable(uri, error) from error
    return rows


def _unreadable(uri: str, error: Exception) -> CorpusError:
    return CorpusError(
        f"table {storage.redact(uri)}: expected a table that can be read without Spark, found: {error}; check that its "
        "files are there and whole, and that this machine has the storage's credentials for delta-rs and fsspec"
    )


class _Version:
    """The rows of one version, from its pinned copy if it is pinned.

    Raises:
        VersionGoneError: the version or one of its files is gone.
        CorpusError: its files alone do not hold its rows (`delta_features`).
    """

    def __init__(self, root: str, name: str, number: int, is_pinned: bool) -> None:
        from deltalake.exceptions import DeltaError, TableNotFoundError

        self.name, self.number = name, number
        layout = Root(root)
        if not is_pinned and not delta_log.has_commits(layout.refined(name)):
            raise VersionGoneError(corpus_records.no_table_message(root, name, [number]))
        uri, version = (layout.pinned(name, number), None) if is_pinned else (layout.refined(name), number)
        try:
            self._files = delta_files.parquet_files(uri, version)
        except (DeltaError, OSError) as error:
            commit = delta_log.commit_uri(uri, version or 0)
            if isinstance(error, TableNotFoundError | FileNotFoundError) or not storage.exists(commit):
                raise self._gone() from error
            raise _unreadable(uri, error) from error
        self.n_rows = sum(self._n_rows(file) for file in self._files)

    def _gone(self) -> VersionGoneError:
        return VersionGoneError(corpus_records.gone_message(self.name, self.number))

    def _n_rows(self, file: str) -> int:
        import pyarrow.parquet as pq

        try:
            with fsspec.open(file, "rb") as handle:
                return int(pq.read_metadata(handle).num_rows)
        except FileNotFoundError as error:
            raise self._gone() from error

    def _batches(self, columns: list[str]) -> Iterator["pa.RecordBatch"]:
        import pyarrow.parquet as pq

        for file in self._files:
            try:
                with fsspec.open(file, "rb") as handle:
                    yield from pq.ParquetFile(handle).iter_batches(_BATCH_ROWS, columns=columns)
            except FileNotFoundError as error:
                raise self._gone() from error

    def by_source(self) -> CountsBySource:
        counted = _Rows(0)
        for batch in self._batches(["source", "n_tokens"]):
            counted.add(batch)
        return counted.by_source()

    def rows(self, low: str, high: str) -> "pa.Table":
        """The rows whose id is at least `low` and below `high`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        kept = []
        for batch in self._batches(["instance_id", "source", "n_tokens", "score"]):
            ids = batch.column("instance_id")
            kept.append(batch.filter(pc.and_(pc.greater_equal(ids, low), pc.less(ids, high))))
        fields = [
            ("instance_id", pa.string()),
            ("source", pa.string()),
            ("n_tokens", pa.int64()),
            ("score", pa.float64()),
        ]
        return pa.Table.from_batches(kept).cast(pa.schema(fields)) if kept else pa.schema(fields).empty_table()


def _id_ranges(n_parts: int) -> Iterator[tuple[str, str]]:
    """Cuts the space of ids (32 hexadecimal digits) into `n_parts` equal ranges [low, high)."""
    cuts = [f"{part * 16**8 // n_parts:08x}" for part in range(1, n_parts)]
    return zip(["", *cuts], [*cuts, "g"], strict=True)  # g: greater than every digit


def _is_in(rows: "pa.Table", others: "pa.Table") -> Any:
    import pyarrow.compute as pc

    return pc.is_in(rows.column("instance_id"), value_set=others.column("instance_id"))


def _without(rows: "pa.Table", mask: Any) -> "pa.Table":
    import pyarrow.compute as pc

    return rows.filter(pc.invert(mask))


class _RankedRow(NamedTuple):
    score: float
    # Among rows with equal scores, the lowest id comes first.
    id_order: tuple[int, ...]
    instance_id: str
    source: str


class _Rows:
    """Sums over rows that come in parts, and the `n_examples` rows with the highest scores."""

    def __init__(self, n_examples: int) -> None:
        self._n_examples = n_examples
        self._instances: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self.examples: list[_RankedRow] = []

    def add(self, rows: "pa.Table | pa.RecordBatch") -> None:
        """Adds rows with the columns source and n_tokens; with examples, instance_id and score too."""
        import pyarrow as pa

        table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
        sums = table.group_by("source").aggregate([("n_tokens", "count"), ("n_tokens", "sum")])
        for row in sums.to_pylist():
            self._instances[row["source"]] += row["n_tokens_count"]
            self._tokens[row["source"]] += row["n_tokens_sum"] or 0
        if self._n_examples > 0 and table.num_rows:
            order = [("score", "descending"), ("instance_id", "ascending")]
            best = table.take(_first(table, order, self._n_examples)).to_pylist()
            examples = [
                _RankedRow(
                    row["score"], tuple(-ord(digit) for digit in row["instance_id"]), row["instance_id"], row["source"]
                )
                for row in best
            ]
            self.examples = heapq.nlargest(self._n_examples, [*self.examples, *examples])

    def by_source(self) -> CountsBySource:
        return {
            source: {"n_instances": n_instances, "n_tokens": self._tokens[source]}
            for source, n_instances in sorted(self._instances.items())
        }

    def with_texts(self, texts: dict[str, str]) -> list[ShownInstance]:
        return [
            {
                "instance_id": row.instance_id,
                "source": row.source,
                "score": row.score,
                "text": texts.get(row.instance_id),
            }
            for row in self.examples
        ]


def _first(table: "pa.Table", order: list[tuple[str, str]], n_rows: int) -> Any:
    import pyarrow.compute as pc

    return pc.select_k_unstable(table, k=n_rows, sort_keys=order)


def _texts(root: str, ids: Collection[str]) -> dict[str, str]:
    """The beginnings of the texts of some instances, by id; an instance that is not there is left out.

    Reads the ids of each row group of `instances`, but the texts only of row groups that hold a wanted id.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    uri = Root(root).table("instances")
    wanted = set(ids)
    texts: dict[str, str] = {}
    if not wanted or not delta_log.has_commits(uri):
        return texts
    for file in delta_files.parquet_files(uri):
        with fsspec.open(file, "rb") as handle:
            parquet = pq.ParquetFile(handle)
            for group in range(parquet.num_row_groups):
                group_ids = parquet.read_row_group(group, ["instance_id"]).column("instance_id")
                mask = pc.is_in(group_ids, value_set=pa.array(sorted(wanted), pa.string()))
                if pc.any(mask).as_py():
                    rows = parquet.read_row_group(group, ["instance_id", "text"]).filter(mask)
                    texts.update((row["instance_id"], row["text"][:_TEXT_CHARACTERS]) for row in rows.to_pylist())
        if texts.keys() >= wanted:
            break
    return texts
