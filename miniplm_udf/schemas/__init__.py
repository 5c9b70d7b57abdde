"""The tables, declared once: column, type, nullability, unit, meaning, key. Spark's and Arrow's schemas follow from it.

Owns the declarations; writes nothing (`store/tables.py` writes, and checks against them). `types.py` makes Spark's and
Arrow's schemas of a declaration, `table_names.py` the names of tables in folders; `table_kinds.py` says what the
commands do with each table. Imports no pyspark and no pyarrow.

A Delta table holds a column as nullable or not exactly as declared here. Units are in names: `_nats`, `_bytes`,
`_tokens`; `n_` is a count. Timestamps are UTC microseconds. Ids are 128-bit hashes as 32 hexadecimal digits.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.types import Column, Table

SPLITS = ("pool", "reference", "heldout")

# `rejects.stage` of an instance that a model could not score: this prefix and the model's revision.
SCORE_STAGE = "score:"
# The same of an instance that a model could not continue, with the revision of the generation.
GENERATE_STAGE = "generate:"

_QUERY = (
    Column("query_id", "string", "id of the query that wrote the row (new with every new checkpoint)"),
    Column("batch_id", "int64", "micro-batch of that query"),
)

# Rows that came together are searched together: a search for ids opens only the files of their micro-batches.
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
        # Copied from the instance for score_matrix, so that keeping the matrix never reads `instances`.
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
        Column(
            "estimated_tokens", "int64", "n_bytes / bytes per token of its source, for the model `refine.tokens_of`"
        ),
        Column("prediction", "float64", "the proxy's estimate of `proxy.score`, in the unit of that score"),
        Column("proxy_revision", "string", "hash of the rows and the settings that the proxy was fitted with"),
        INSTANCE_BATCH_ID,
        *_QUERY,
    ),
)

GENERATIONS = Table(
    name="generations",
    key=("instance_id", "generation_revision"),
    statistics=("instance_id", "generation_revision", "instance_batch_id", "query_id", "batch_id"),
    columns=(
        Column("instance_id", "string", "the instance whose beginning is the prompt"),
        Column("generation_revision", "string", "hash of the model's revision and of all settings but `sample`"),
        Column("model_id", "string", "alias in the config, for people"),
        Column("model_revision", "string", "hash of weights, dtype, separator and prefix tokens, context"),
        Column("tokenizer_hash", "string", "hash of the tokenizer that the ids belong to"),
        Column("token_ids", "binary", "prompt and continuation, int32 little-endian, without a BOS"),
        Column("n_prompt_tokens", "int64", "ids at the beginning that are the instance's own"),
        Column("n_tokens", "int64", "generated ids, after the prompt"),
        Column("end_reason", "string", "eos, length, or prompt: no longer than a prompt, so nothing was generated"),
        Column("seed", "int64", "`generate.seed`"),
        Column("source", "string", "domain of the instance"),
        Column("document_ids", "list<string>", "documents in the instance"),
        INSTANCE_BATCH_ID,
        Column("run_id", "string", "the command that generated it"),
        Column("generated_at", "timestamp", "when the micro-batch was written"),
        *_QUERY,
    ),
)

REJECTS = Table(
    name="rejects",
    key=("reject_id",),
    statistics=("stage", "reason", "query_id", "batch_id"),
    columns=(
        Column("reject_id", "string", "hash of stage, reason, place and bytes"),
        Column("stage", "string", "ingest, score:<model_revision>, or generate:<generation_revision>"),
        Column("reason", "string", "a fixed word, e.g. invalid_json"),
        Column("detail", "string", "what was found, as a sentence", nullable=True),
        Column("source_file", "string", "the file it came from", nullable=True),
        Column("instance_id", "string", "the instance that could not be scored or continued", nullable=True),
        Column("raw", "binary", "the offending bytes, cut to 4,096", nullable=True),
        Column("n_bytes", "int64", "their full length", nullable=True),
        Column("rejected_at", "timestamp", "when the micro-batch was written"),
        *_QUERY,
    ),
)

DOCUMENT_KEYS = Table(
    name="document_keys",
    key=("document_key", "instance_id"),
    statistics=("query_id", "batch_id"),
    columns=(
        Column("document_key", "string", "hash of a document's id and text; only in roots with packed chunking"),
        Column("instance_id", "string", "the instance in which the document begins"),
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
        Column("code_revision", "string", "version of this package that refined; from a git checkout with the commit"),
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
        Column("tag", "string", "the name that a user gave it", nullable=True),
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
        Column("table", "string", "table that rows were removed from; `documents`: a request for one document"),
        Column("key", "string", "instance_id of the rows; the id of a document; `*` for a whole table"),
        Column("n_rows", "int64", "rows removed; 0 for a request"),
        Column("reason", "string", "the reason that the user gave", nullable=True),
        Column("command", "string", "the command line, and the user who ran it"),
        Column("taken_down_at", "timestamp", "when"),
    ),
)

ANNOTATIONS = "annotations"

# Columns by group of the config's section `annotate`; docs/annotations.md has the sources. Spaces separate words.
ANNOTATIONS_BY_GROUP = {
    "duplicates": (
        Column("duplicate_of", "string", "the first instance of the same text; null: this one", nullable=True),
    ),
    "near_duplicates": (
        Column("near_duplicate_of", "string", "an earlier instance that is nearly the same", nullable=True),
        Column("near_duplicate_jaccard", "float64", "Jaccard similarity of their shingles", nullable=True),
        Column("minhash_buckets", "list<int64>", "hash buckets in which near-duplicates are searched"),
    ),
    "contamination": (
        Column("contaminated_ngrams", "int64", "its n-grams that are in the evaluation files too, with repetitions"),
        Column("contaminated_share", "float64", "their share of all its n-grams; null: it has none", nullable=True),
    ),
    "language": (
        Column("language", "string", "ISO 639 code"),
        Column("language_confidence", "float64", "0 to 1"),
    ),
    "quality": (
        Column("n_words", "int64", "words"),
        Column("mean_word_characters", "float64", "characters other than spaces, over words", nullable=True),
        Column("alphabetic_word_share", "float64", "words with a letter, over words", nullable=True),
        Column("hash_word_ratio", "float64", "signs #, over words", nullable=True),
        Column("ellipsis_word_ratio", "float64", "ellipses, over words", nullable=True),
        Column("n_stop_words", "int64", "how many of the, be, to, of, and, that, have, with occur"),
        Column(
            "unique_word_share", "float64", "distinct words over words, ignoring case and punctuation", nullable=True
        ),
        Column(
            "duplicate_5gram_share", "float64", "runs of 5 words that occurred before, over all runs", nullable=True
        ),
        Column("has_curly_bracket", "bool", "has a {"),
        Column("has_lorem_ipsum", "bool", "has lorem ipsum"),
        Column("n_lines", "int64", "lines that are not blank"),
        Column("bullet_line_share", "float64", "lines that begin with a bullet, over lines", nullable=True),
        Column("ellipsis_line_share", "float64", "lines that end with an ellipsis, over lines", nullable=True),
        Column("punctuated_line_share", "float64", "lines that end with . ! ? or a quotation mark", nullable=True),
        Column("short_line_share", "float64", "lines of fewer than 30 characters, over lines", nullable=True),
        Column("duplicate_line_share", "float64", "lines that occurred before, over lines", nullable=True),
        Column(
            "duplicate_line_character_share", "float64", "characters of these lines, over all characters", nullable=True
        ),
    ),
}


def annotations(groups: Iterable[str]) -> Table:
    """Returns the table of the columns computed from the pool's texts. All rows have the same `annotated_by`.

    Args:
        groups: names of the groups of columns, as the section `annotate` has them.
    """
    return Table(
        name=ANNOTATIONS,
        key=("instance_id",),
        append_only=False,
        statistics=("instance_id",),
        columns=(
            Column("instance_id", "string", "the instance"),
            Column("ingested_at", "timestamp", "the instance's own; of two duplicates it tells the earlier"),
            *(column for group in groups for column in ANNOTATIONS_BY_GROUP[group]),
            Column(
                "annotated_by", "string", "JSON: the section `annotate`, with a hash of the evaluation files' n-grams"
            ),
        ),
    )


def cuts(name: str) -> Table:
    """Returns the table of the matrix's rows by bucket of a corpus's score (cuts.py); each commit replaces all rows.

    Args:
        name: name of the corpus.
    """
    return Table(
        name=table_names.cuts(name),
        key=("bucket",),
        append_only=False,
        statistics=("bucket",),
        columns=(
            Column("bucket", "int64", "number of the bucket; higher scores have higher numbers"),
            Column("n_rows", "int64", "candidates in the bucket"),
            Column("n_tokens", "int64", "their tokens"),
            Column("config", "string", "fingerprint of the resolved corpus config"),
            Column("query_id", "string", "query of the matrix whose rows are counted"),
            Column("batch_id", "int64", "newest micro-batch of that query that is counted"),
        ),
    )


def packed(name: str, tokenizer: str) -> Table:
    """Returns the table of token sequences of a corpus for one student tokenizer.

    Args:
        name: name of the corpus.
        tokenizer: name of the tokenizer in the config.
    """
    return Table(
        name=table_names.packed(name, tokenizer),
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
    """Returns the wide form of `scores`: one row per instance, five columns per model.

    Args:
        aliases: aliases of the models, in the order of their columns.
    """
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
    """Returns the table of a corpus with a recorded config. A corpus that a proxy ranks has no columns of models.

    Args:
        name: name of the corpus.
        config: the config in the provenance of a version.
    """
    is_scored = config.get("candidates", "score_matrix") == "score_matrix"
    return refined(name, list(config["models"]) if is_scored else [])


def refined(name: str, aliases: list[str]) -> Table:
    """Returns the table of a corpus: the kept ids, their score and the models' numbers behind it. No text.

    Args:
        name: name of the corpus.
        aliases: aliases of the models whose numbers it holds.
    """
    models = tuple(
        column
        for alias in aliases
        for column in (
            Column(f"{alias}_nll_mean", "float64", "nats per token"),
            Column(f"{alias}_n_tokens", "int64", "scored tokens"),
        )
    )
    return Table(
        name=table_names.refined(name),
        key=("instance_id",),
        append_only=False,
        pinnable=True,
        statistics=("instance_id", "source", "score"),
        columns=(
            Column("instance_id", "string", "a kept instance"),
            Column("source", "string", "domain"),
            Column("n_tokens", "int64", "tokens, counted by the model `refine.tokens_of`"),
            Column("n_bytes", "int64", "UTF-8 length of the text"),
            Column("score", "float64", "the rank statistic; higher is kept first"),
            *models,
        ),
    )
