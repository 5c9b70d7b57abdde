"""`<root>/models/tokenizer_<name>/`: the tokenizers that text is packed with. Made once, then frozen.

Owns these folders: tokenizer.json, tokenizer_config.json (for transformers), miniplm.json (separator, hash, size and
fingerprint of the config). A student's is a byte-level BPE trained on `pool` text, or copied from a path; the
reference's is that of the scoring model it is compared with, byte for byte. Driver, which needs no tokenizer library:
training, and finding a model's files, is done by one task on an executor. A folder is remade only where its config
changed; a retry replaces it.
"""

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import errors, storage, tables
from miniplm_udf.config import ExperimentConfig, ModelConfig, TokenizerConfig, fingerprint
from miniplm_udf.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.tokenizers")

TOKENIZER_FILE = "tokenizer.json"
_RESULT_DDL = (
    "content binary, document_separator string, document_separator_id int, vocab_size int, "
    "error_class string, error string"
)
# Ids are hashes, so a prefix of their range is a sample; a little more than asked for, since texts differ in length.
_SAMPLE_MARGIN = 1.25

ArrowFunction = Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]


@dataclasses.dataclass(frozen=True)
class PackTokenizer:
    """A tokenizer folder's content, as it travels to executors.

    Attributes:
        content: the bytes of tokenizer.json.
        vocab_size: one more than the largest id.
    """

    name: str
    content: bytes
    document_separator: str
    document_separator_id: int
    vocab_size: int

    @property
    def tokenizer_hash(self) -> str:
        """32 hex digits of tokenizer.json, as scoring.tokenizer.tokenizer_hash gives for its folder."""
        return hashlib.sha256(self.content).hexdigest()[:32]


def ensure_tokenizer(spark: "SparkSession", config: ExperimentConfig, name: str) -> PackTokenizer:
    """The tokenizer `name` of `config.tokenizers`; trained, or copied, where its folder is not there yet.

    Raises:
        ConfigError: no such tokenizer, or its separator is not one token of it.
        CorpusError: there is no `pool` text to train it on.
        ModelLoadError: there is no tokenizer at its path.
    """
    if name not in config.tokenizers:
        raise ConfigError(f"tokenizer {name!r}: expected one of {sorted(config.tokenizers)} (section tokenizers)")
    wanted = config.tokenizers[name]

    def make() -> PackTokenizer:
        if wanted.path is None:
            return _train(spark, config, name, wanted)
        return _run_one(spark, name, _copy_function(name, dataclasses.replace(wanted, path=_absolute(wanted.path))))

    return _ensure(config, name, f"tokenizers.{name}", fingerprint("tokenizer", wanted), make)


def ensure_model_tokenizer(spark: "SparkSession", config: ExperimentConfig, alias: str) -> PackTokenizer:
    """The tokenizer of the scored model `alias`, with that model's document separator.

    Raises:
        ConfigError: the model has no path of its own, its separator has to be named, or a tokenizer has its name.
        ModelLoadError: the model is not there, or has no fast tokenizer.
    """
    model = config.models[alias]
    if alias in config.tokenizers:
        raise ConfigError(f"tokenizers.{alias}: expected a name that is no model alias; rename this tokenizer")
    if model.path is None:
        raise ConfigError(f"reference.tokenizer: expected a model with a path, found {alias!r}, which has none")
    located = dataclasses.replace(model, path=_absolute(model.path))
    identity = fingerprint("model", model.path, model.revision, model.document_separator)
    return _ensure(
        config, alias, f"models.{alias}", identity, lambda: _run_one(spark, alias, _model_function(alias, located))
    )


def _absolute(path: str) -> str:
    """A bare path that exists, made to mean the same on another working directory."""
    return storage.to_uri(path) if Path(path).expanduser().exists() else path


# --- the folder ---


def _ensure(
    config: ExperimentConfig, name: str, where: str, identity: str, make: Callable[[], PackTokenizer]
) -> PackTokenizer:
    uri = config.model_uri(f"tokenizer_{name}")
    record = storage.read_json(storage.join(uri, "miniplm.json"))
    if record is not None and record.get("fingerprint") == identity:
        with fsspec.open(storage.join(uri, TOKENIZER_FILE), "rb") as handle:
            content = handle.read()
        known = {key: record[key] for key in ("document_separator", "document_separator_id", "vocab_size")}
        return PackTokenizer(name=name, content=content, **known)
    if record is not None:
        LOGGER.warning("%s: its config changed, so it is made anew, and so is what is packed with it", where)
    found = make()
    _save(uri, found, identity)
    LOGGER.info("%s: %d entries, %s", where, found.vocab_size, storage.redact(uri))
    return found


def _save(uri: str, found: PackTokenizer, identity: str) -> None:
    # A trained student is no chat model, even where its tokenizer comes from one: its eos_token is the separator.
    for_transformers = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": found.document_separator,
        "clean_up_tokenization_spaces": False,
    }
    record = {
        "document_separator": found.document_separator,
        "document_separator_id": found.document_separator_id,
        "tokenizer_hash": found.tokenizer_hash,
        "vocab_size": found.vocab_size,
        "fingerprint": identity,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / TOKENIZER_FILE).write_bytes(found.content)
        storage.write_json(str(folder / "tokenizer_config.json"), for_transformers)
        storage.write_json(str(folder / "miniplm.json"), record)
        storage.upload_folder(folder, uri)


# --- one task on an executor ---


def _run_one(
    spark: "SparkSession", name: str, function: ArrowFunction, rows: "DataFrame | None" = None
) -> PackTokenizer:
    """Runs the function in one task and returns the tokenizer that it makes, or raises the error that it reports."""
    source = spark.range(0, 1, numPartitions=1) if rows is None else rows
    (row,) = source.mapInArrow(function, _RESULT_DDL).collect()
    if row["error_class"] is not None:
        raise getattr(errors, row["error_class"], errors.MiniplmError)(row["error"])
    return PackTokenizer(
        name=name,
        content=bytes(row["content"]),
        document_separator=row["document_separator"],
        document_separator_id=row["document_separator_id"],
        vocab_size=row["vocab_size"],
    )


def _result(where: str, make: Callable[[], tuple[bytes, str]]) -> "pa.RecordBatch":
    """What `make` returns (tokenizer.json, separator), looked at; or a MiniplmError as data.

    Raised in a task it would be retried, and lose its class.
    """
    import pyarrow as pa

    row: dict[str, Any] = {}
    try:
        content, separator = make()
        separator_id, vocab_size = _look_at(where, content, separator)
        row = {
            "content": content,
            "document_separator": separator,
            "document_separator_id": separator_id,
            "vocab_size": vocab_size,
        }
    except errors.MiniplmError as error:
        row = {"error_class": type(error).__name__, "error": str(error)}
    types = {"binary": pa.binary(), "string": pa.string(), "int": pa.int32()}
    schema = pa.schema([(name, types[kind]) for name, kind in (column.split() for column in _RESULT_DDL.split(", "))])
    return pa.RecordBatch.from_pylist([row], schema=schema)


def _look_at(where: str, content: bytes, separator: str) -> tuple[int, int]:
    """The separator's id and the vocabulary's size."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    separator_id = tokenizer.token_to_id(separator)
    if separator_id is None:
        raise ConfigError(
            f"{where}.document_separator: expected one token of the tokenizer, found {separator!r}, which is not one; "
            "set it to the token that ends documents there"
        )
    return separator_id, max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _copy_function(name: str, wanted: TokenizerConfig) -> ArrowFunction:
    def copy(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        def make() -> tuple[bytes, str]:
            from miniplm_udf.scoring.models import resolve

            assert wanted.path is not None
            # A folder with a tokenizer alone will do here; everything else goes by the rules for models.
            folder = Path(storage.local_path(wanted.path)) if storage.is_local(wanted.path) else None
            if folder is None or not (folder / TOKENIZER_FILE).is_file():
                folder = resolve(ModelConfig(path=wanted.path, revision=wanted.revision))
            return (folder / TOKENIZER_FILE).read_bytes(), wanted.document_separator

        for _ in batches:
            yield _result(f"tokenizers.{name}", make)

    return copy


def _model_function(alias: str, model: ModelConfig) -> ArrowFunction:
    def copy_of_model(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        def make() -> tuple[bytes, str]:
            from miniplm_udf.scoring.models import describe, resolve

            separator = describe(alias, model).document_separator
            return (resolve(model) / TOKENIZER_FILE).read_bytes(), separator

        for _ in batches:
            yield _result(f"models.{alias}", make)

    return copy_of_model


# --- training ---


def _train(spark: "SparkSession", config: ExperimentConfig, name: str, wanted: TokenizerConfig) -> PackTokenizer:
    """Trains on `pool` texts in the order of their ids, which is a random one, up to `train_bytes`."""
    from pyspark.sql import functions as F

    pool = tables.read(spark, config.table_uri("instances")).where("split = 'pool'")
    (total_bytes,) = pool.agg(F.sum("n_bytes")).collect()[0]
    if not total_bytes:
        raise CorpusError(
            f"tokenizers.{name}: expected `pool` text to train it on, found none in "
            f"{storage.redact(config.table_uri('instances'))}; run ingest, or lower ingest.split's shares"
        )
    share = wanted.train_bytes * _SAMPLE_MARGIN / total_bytes
    if share < 1:
        pool = pool.where(F.col("instance_id") < f"{int(share * 16**8):08x}")
    texts = pool.select("instance_id", "text").repartition(1).sortWithinPartitions("instance_id")
    LOGGER.info("tokenizers.%s: training on %d bytes", name, min(int(total_bytes), wanted.train_bytes))
    return _run_one(spark, name, _train_function(name, wanted), texts)


def _train_function(name: str, wanted: TokenizerConfig) -> ArrowFunction:
    def train(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        def texts() -> Iterator[str]:
            left = wanted.train_bytes
            for batch in batches:
                for text in batch.column("text").to_pylist():
                    if left <= 0:
                        return
                    left -= len(text.encode("utf-8"))
                    yield text

        trained = train_bpe(texts(), wanted.vocab_size, wanted.document_separator)
        yield _result(f"tokenizers.{name}", lambda: (trained, wanted.document_separator))

    return train


def train_bpe(texts: Iterator[str], vocab_size: int, document_separator: str) -> bytes:
    """Trains a byte-level BPE, whose one special token is the separator; returns its tokenizer.json.

    Every text can be encoded, and decoding gives it back byte for byte. A text too small for `vocab_size` gives fewer
    entries; the 256 bytes and the separator are always there. The same texts in the same order give the same bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[document_separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str()).encode("utf-8")
