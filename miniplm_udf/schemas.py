"""The tables, declared once: column, type, nullability, unit, meaning, key. Spark's and Arrow's schemas derive from it.

Owns names and types; writes nothing (`tables.py` writes, and checks against this). Imports nothing heavy: pyspark and
pyarrow are loaded only by the function that makes their schema.

A Delta table holds a column as nullable or not exactly as declared here. Units are in names: `_nats`, `_bytes`,
`_tokens`; `n_` is a count. Timestamps are UTC microseconds. Ids are 128-bit hashes as 32 hexadecimal digits.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql.types import StructType

SPLITS = ("pool", "reference", "heldout")

_SPARK_TYPES = {
    "string": "string",
    "int32": "int",
    "int64": "bigint",
    "float64": "double",
    "bool": "boolean",
    "timestamp": "timestamp",
    "binary": "binary",
    "list<string>": "array<string>",
    "list<int32>": "array<int>",
    "list<int64>": "array<bigint>",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One column. `type` is a key of `_SPARK_TYPES`; lists hold no nulls."""

    name: str
    type: str
    meaning: str
    nullable: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """One table. `key` is unique; `append_only` tables carry `query_id` and `batch_id`.

    `statistics` names the columns Delta keeps minimum and maximum of (text and tokens stay out of the log).
    `pinnable` tables keep their files for years, so that time travel to an old version is never refused.
    """

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    append_only: bool = True
    pinnable: bool = False
    statistics: tuple[str, ...] = ()

    @property
    def column_names(self) -> list[str]:
        return [column.name for column in self.columns]

    def spark_schema(self) -> "StructType":
        """The Spark schema, nullability included."""
        from pyspark.sql.types import ArrayType, StructField, StructType, _parse_datatype_string

        def field(column: Column) -> "StructField":
            data_type = _parse_datatype_string(_SPARK_TYPES[column.type])
            if isinstance(data_type, ArrayType):
                data_type = ArrayType(data_type.elementType, containsNull=False)
            return StructField(column.name, data_type, column.nullable)

        return StructType([field(column) for column in self.columns])

    def arrow_schema(self) -> "pa.Schema":
        """The Arrow schema, nullability included."""
        import pyarrow as pa

        types: dict[str, Any] = {
            "string": pa.string(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "float64": pa.float64(),
            "bool": pa.bool_(),
            "timestamp": pa.timestamp("us", tz="UTC"),
            "binary": pa.binary(),
            "list<string>": pa.list_(pa.field("element", pa.string(), nullable=False)),
            "list<int32>": pa.list_(pa.field("element", pa.int32(), nullable=False)),
            "list<int64>": pa.list_(pa.field("element", pa.int64(), nullable=False)),
        }
        return pa.schema([pa.field(c.name, types[c.type], nullable=c.nullable) for c in self.columns])

    def delta_properties(self) -> dict[str, str]:
        """Table properties to set when the table is made. None of them is a feature that delta-rs cannot read."""
        properties = {"delta.dataSkippingStatsColumns": ",".join(self.statistics)} if self.statistics else {}
        if self.pinnable:
            properties["delta.deletedFileRetentionDuration"] = "interval 3650 days"
            properties["delta.logRetentionDuration"] = "interval 3650 days"
        return properties


_QUERY = (
    Column("query_id", "string", "id of the query that wrote the row (new with every new checkpoint)"),
    Column("batch_id", "int64", "micro-batch of that query"),
)

# What came together is looked for together: a look for ids opens the files of their batches alone, not the whole table.
INSTANCE_BATCH_ID = Column("instance_batch_id", "int64", "the instance's batch_id in `instances`")

INSTANCES = Table(
    name="instances",
    key=("instance_id",),
    statistics=("instance_id", "source", "split", "query_id", "batch_id"),
    columns=(
        Column("instance_id", "string", "hash of document ids, ordinal, text and chunking spec"),
        Column("stream_id", "string", "the token stream it was cut from: a document, or one packed run of documents"),
        Column("ordinal", "int64", "position in that stream: ordinals n and n+1 are adjacent text"),
        Column("document_ids", "list<string>", "documents in it, in order; a cut document stands in every slice"),
        Column("start_byte", "int64", "UTF-8 byte offset of the text's start inside its first document"),
        Column("source", "string", "domain"),
        Column("text", "string", "the text, sliced from the source byte for byte"),
        Column("segment_ends", "list<int32>", "UTF-8 byte offsets in text where a document ends and another begins"),
        Column("starts_document", "bool", "the text begins at the beginning of its first document"),
        Column("ends_document", "bool", "the text ends at the end of its last document"),
        Column("n_bytes", "int64", "UTF-8 length of the text"),
        Column("content_hash", "string", "hash of the text alone"),
        Column("split", "string", "pool, reference or heldout"),
        Column("metadata", "string", "JSON array, one object a document, of the carried fields", nullable=True),
        Column("ingested_at", "timestamp", "when the micro-batch was written"),
        *_QUERY,
    ),
)

SCORES = Table(
    name="scores",
    key=("instance_id", "model_revision"),
    statistics=("instance_id", "model_revision", "instance_batch_id", "query_id", "batch_id"),
    columns=(
        Column("instance_id", "string", "the scored instance"),
        Column("model_id", "string", "alias in the config, for people"),
        Column("model_revision", "string", "hash of weights, dtype, separator and prefix tokens, context"),
        Column("tokenizer_hash", "string", "hash of the tokenizer"),
        Column("nll_sum_nats", "float64", "sum of -log p over the scored tokens"),
        Column("n_tokens", "int64", "number of scored tokens"),
        Column("n_bytes", "int64", "UTF-8 bytes that the scored tokens cover"),
        # Of the instance: what score_matrix needs of it, so that keeping the matrix never reads `instances`.
        Column("source", "string", "domain of the instance"),
        Column("split", "string", "pool, reference or heldout"),
        Column("content_hash", "string", "hash of the instance's text alone"),
        Column("text_bytes", "int64", "UTF-8 length of the instance's text"),
        INSTANCE_BATCH_ID,
        Column("dtype", "string", "dtype of the forward pass"),
        Column("context_tokens", "int64", "longest input of one forward pass"),
        Column("run_id", "string", "the command that scored it"),
        Column("scored_at", "timestamp", "when the micro-batch was written"),
        *_QUERY,
    ),
)

PROXY_SCORES = Table(
    name="proxy_scores",
    key=("instance_id",),
    statistics=("instance_id", "source", "instance_batch_id", "query_id", "batch_id"),
    columns=(
        Column("instance_id", "string", "an instance of the pool, scored by models or not"),
        Column("source", "string", "domain"),
        Column("split", "string", "pool"),
        Column("n_bytes", "int64", "UTF-8 length of the text"),
        Column("content_hash", "string", "hash of the text alone"),
        Column("estimated_tokens", "int64", "n_bytes / bytes a token of its source, of the model `refine.tokens_of`"),
        Column("prediction", "float64", "what the proxy expects of `proxy.score`, in its unit"),
        Column("proxy_revision", "string", "hash of what the proxy was fitted on and how"),
        INSTANCE_BATCH_ID,
        *_QUERY,
    ),
)

REJECTS = Table(
    name="rejects",
    key=("reject_id",),
    statistics=("stage", "reason", "query_id", "batch_id"),
    columns=(
        Column("reject_id", "string", "hash of stage, reason, place and bytes"),
        Column("stage", "string", "ingest, or score:<model_revision>"),
        Column("reason", "string", "a fixed word, e.g. invalid_json"),
        Column("detail", "string", "what was found, for people", nullable=True),
        Column("source_file", "string", "the file it came from", nullable=True),
        Column("instance_id", "string", "the instance that could not be scored", nullable=True),
        Column("raw", "binary", "the offending bytes, cut to 4,096", nullable=True),
        Column("n_bytes", "int64", "their full length", nullable=True),
        Column("rejected_at", "timestamp", "when the micro-batch was written"),
        *_QUERY,
    ),
)

CORPORA = Table(
    name="corpora",
    key=("name", "version"),
    columns=(
        Column("name", "string", "name of the refined corpus"),
        Column("version", "int64", "Delta version of refined/<name>"),
        Column("config", "string", "JSON: the resolved corpus config"),
        Column("inputs", "string", "JSON: matrix version, last (query_id, batch_id) of each query, model revisions"),
        Column("threshold", "float64", "score at the cut: the lowest kept", nullable=True),
        Column("n_candidates", "int64", "rows that passed `where`"),
        Column("candidate_tokens", "int64", "their tokens"),
        Column("n_instances", "int64", "rows kept"),
        Column("n_tokens", "int64", "their tokens"),
        Column("fingerprint", "string", "hash of the kept ids and scores, independent of order"),
        Column("code_revision", "string", "version of this package that refined, and of a checkout the commit"),
        Column("created_at", "timestamp", "when"),
    ),
)

PINS = Table(
    name="pins",
    key=("name", "version"),
    append_only=False,
    columns=(
        Column("name", "string", "name of the refined corpus"),
        Column("version", "int64", "the pinned version; its rows are copied to pinned/<name>/<version>"),
        Column("tag", "string", "what people call it", nullable=True),
        Column("n_instances", "int64", "rows of the copy"),
        Column("fingerprint", "string", "hash of its ids and scores, independent of order"),
        Column("pinned_at", "timestamp", "when"),
    ),
)

TAKEDOWNS = Table(
    name="takedowns",
    key=("takedown_id", "table", "key"),
    append_only=False,
    columns=(
        Column("takedown_id", "string", "the command that took it down"),
        Column("table", "string", "where rows were removed; `documents`: what was asked for"),
        Column("key", "string", "instance_id of the rows; the id of a document; `*` for a table as a whole"),
        Column("n_rows", "int64", "rows removed; 0 for what was asked for"),
        Column("reason", "string", "as given", nullable=True),
        Column("command", "string", "the command, and by whom"),
        Column("taken_down_at", "timestamp", "when"),
    ),
)


ANNOTATIONS = "annotations"

# By group of the config's section `annotate`; docs/annotations.md has the sources. Words stand between spaces.
ANNOTATIONS_BY_GROUP = {
    "duplicates": (
        Column("duplicate_of", "string", "the first instance of the same text; null: this one", nullable=True),
    ),
    "near_duplicates": (
        Column("near_duplicate_of", "string", "the first found before it that is nearly the same", nullable=True),
        Column("near_duplicate_jaccard", "float64", "Jaccard similarity of their shingles", nullable=True),
        Column("minhash_buckets", "list<int64>", "where near-duplicates of it are looked for"),
    ),
    "contamination": (
        Column("contaminated_ngrams", "int64", "its n-grams that stand in the evaluation files, each time they occur"),
        Column("contaminated_share", "float64", "of all its n-grams; null: it has none", nullable=True),
    ),
    "language": (
        Column("language", "string", "ISO 639 code"),
        Column("language_confidence", "float64", "0 to 1"),
    ),
    "quality": (
        Column("n_words", "int64", "words"),
        Column("mean_word_characters", "float64", "characters that are no space, over words", nullable=True),
        Column("alphabetic_word_share", "float64", "words with a letter, over words", nullable=True),
        Column("hash_word_ratio", "float64", "signs #, over words", nullable=True),
        Column("ellipsis_word_ratio", "float64", "ellipses, over words", nullable=True),
        Column("n_stop_words", "int64", "how many of the, be, to, of, and, that, have, with occur"),
        Column("unique_word_share", "float64", "different words over words, case and signs apart", nullable=True),
        Column("duplicate_5gram_share", "float64", "runs of 5 words that occurred before, over all", nullable=True),
        Column("has_curly_bracket", "bool", "has a {"),
        Column("has_lorem_ipsum", "bool", "has lorem ipsum"),
        Column("n_lines", "int64", "lines that are not blank"),
        Column("bullet_line_share", "float64", "lines that begin with a bullet, over lines", nullable=True),
        Column("ellipsis_line_share", "float64", "lines that end with an ellipsis, over lines", nullable=True),
        Column("punctuated_line_share", "float64", "lines that end with . ! ? or a quotation mark", nullable=True),
        Column("short_line_share", "float64", "lines of fewer than 30 characters, over lines", nullable=True),
        Column("duplicate_line_share", "float64", "lines that occurred before, over lines", nullable=True),
        Column("duplicate_line_character_share", "float64", "their characters, over those of all", nullable=True),
    ),
}


def annotations(groups: Iterable[str]) -> Table:
    """What the pool's texts say beside their scores, as groups of columns. All rows have one `annotated_by`."""
    return Table(
        name=ANNOTATIONS,
        key=("instance_id",),
        append_only=False,
        statistics=("instance_id",),
        columns=(
            Column("instance_id", "string", "the instance"),
            Column("ingested_at", "timestamp", "of the instance: of two, it tells which was first"),
            *(column for group in groups for column in ANNOTATIONS_BY_GROUP[group]),
            Column("annotated_by", "string", "JSON: the section `annotate`; of evaluation files a hash of n-grams"),
        ),
    )


def cuts(name: str) -> Table:
    """What corpus `name` has counted of the matrix, in buckets of the score (cuts.py); each commit replaces it."""
    return Table(
        name=f"cuts/{name}",
        key=("bucket",),
        append_only=False,
        statistics=("bucket",),
        columns=(
            Column("bucket", "int64", "number of the bucket; of higher scores, higher"),
            Column("n_rows", "int64", "candidates in it"),
            Column("n_tokens", "int64", "their tokens"),
            Column("config", "string", "fingerprint of the resolved corpus config"),
            Column("query_id", "string", "query of the matrix whose rows are counted"),
            Column("batch_id", "int64", "micro-batch of it up to which they are"),
        ),
    )


def packed(name: str, tokenizer: str) -> Table:
    """The table of token sequences of corpus `name` for one student tokenizer."""
    return Table(
        name=f"packed/{name}/{tokenizer}",
        key=("sequence_id",),
        append_only=False,
        pinnable=True,
        statistics=("sequence_id",),
        columns=(
            Column("sequence_id", "int64", "position in the stored order"),
            Column("token_ids", "binary", "sequence_length + 1 token ids, int32 little-endian"),
            Column("target_mask", "binary", "sequence_length bytes: 1 where token_ids[i + 1] is a target of token i"),
            Column("n_targets", "int32", "sum of target_mask"),
        ),
    )


def score_matrix(aliases: list[str]) -> Table:
    """The wide form of `scores`: one row an instance, five columns a model alias."""
    models = tuple(
        column
        for alias in aliases
        for column in (
            Column(f"{alias}_nll_mean", "float64", "nll_sum_nats / n_tokens, nats per token"),
            Column(f"{alias}_nll_sum_nats", "float64", "sum of -log p"),
            Column(f"{alias}_n_tokens", "int64", "scored tokens"),
            Column(f"{alias}_bits_per_byte", "float64", "null unless every byte was scored", nullable=True),
            Column(f"{alias}_revision", "string", "model_revision"),
        )
    )
    return Table(
        name="score_matrix",
        key=("instance_id",),
        statistics=("instance_id", "source", "split", "instance_batch_id", "query_id", "batch_id"),
        columns=(
            Column("instance_id", "string", "the instance"),
            Column("source", "string", "domain"),
            Column("split", "string", "pool, reference or heldout"),
            Column("n_bytes", "int64", "UTF-8 length of the text"),
            Column("content_hash", "string", "hash of the text alone"),
            INSTANCE_BATCH_ID,
            *models,
            *_QUERY,
        ),
    )


def refined_as(name: str, config: Mapping[str, Any]) -> Table:
    """The table of a corpus by the config that is recorded of it: what a proxy ranks has no columns of models."""
    is_scored = config.get("candidates", "score_matrix") == "score_matrix"
    return refined(name, list(config["models"]) if is_scored else [])


def refined(name: str, aliases: list[str]) -> Table:
    """A corpus: the kept ids, the score and what it was made of. No text."""
    models = tuple(
        column
        for alias in aliases
        for column in (
            Column(f"{alias}_nll_mean", "float64", "nats per token"),
            Column(f"{alias}_n_tokens", "int64", "scored tokens"),
        )
    )
    return Table(
        name=f"refined/{name}",
        key=("instance_id",),
        append_only=False,
        pinnable=True,
        statistics=("instance_id", "source", "score"),
        columns=(
            Column("instance_id", "string", "a kept instance"),
            Column("source", "string", "domain"),
            Column("n_tokens", "int64", "tokens of the model that the selection counts with"),
            Column("n_bytes", "int64", "UTF-8 length of the text"),
            Column("score", "float64", "the rank statistic; higher is kept first"),
            *models,
        ),
    )
