"""The tokenizers that text is packed with, in `<root>/models/tokenizer_<name>/`. Made once, then frozen.

Input: an `ExperimentConfig` and a name. Output: a `PackTokenizer`. Owns these folders: tokenizer.json,
tokenizer_config.json (for transformers), miniplm.json (separator, hash, size and fingerprint of the config). A
student's tokenizer is a byte-level BPE that is trained on `pool` text, or a copy from a path; the reference's tokenizer
is a byte-for-byte copy from the scoring model that the reference is compared with. Driver, which needs no tokenizer
library: one task on an executor trains, or reads a model's files. A folder is made again only if its config changed; a
retry replaces it.
"""

import dataclasses
import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.sections import ModelConfig, TokenizerConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.layout import TOKENIZER_RECORD_FILE
from miniplm_udf.scoring.description import with_absolute_path
from miniplm_udf.store import tables
from miniplm_udf.store.model_records import TokenizerRecord, read_tokenizer_record
from miniplm_udf.workers.remote import run_on_executor, run_over_rows

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.tokenizers")

TOKENIZER_FILE = "tokenizer.json"
# Instance ids are hashes, so ids below a limit are a random sample. A little more text is read than `train_bytes`,
# because texts differ in length.
_SAMPLE_MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class PackTokenizer:
    """The content of a tokenizer folder, which is sent to executors.

    Attributes:
        name: name in the section `tokenizers`, or alias of the model that the tokenizer is copied from.
        content: the bytes of tokenizer.json.
        document_separator: the token that ends a document.
        document_separator_id: id of that token.
        vocab_size: one more than the largest id.
    """

    name: str
    content: bytes
    document_separator: str
    document_separator_id: int
    vocab_size: int

    @property
    def tokenizer_hash(self) -> str:
        """Hash of tokenizer.json, 32 hexadecimal digits, as `scoring.tokenizer.tokenizer_hash` gives for its folder."""
        return hashlib.sha256(self.content).hexdigest()[:32]

    def load(self) -> Any:
        """Loads the tokenizer with the `tokenizers` library. On an executor."""
        return _loaded(self.content)


def ensure_tokenizer(spark: "SparkSession", config: ExperimentConfig, name: str) -> PackTokenizer:
    """Returns the tokenizer `tokenizers.<name>`; trains or copies it if its folder does not exist.

    Args:
        spark: a session.
        config: the experiment.
        name: name in the section `tokenizers`.

    Raises:
        ConfigError: there is no such tokenizer, or its separator is not one of its tokens.
        CorpusError: there is no `pool` text to train it on.
        ModelLoadError: there is no tokenizer at its path.
    """
    if name not in config.tokenizers:
        raise ConfigError(f"tokenizer {name!r}: expected one of {sorted(config.tokenizers)} (section tokenizers)")
    wanted = config.tokenizers[name]

    def make() -> PackTokenizer:
        if wanted.path is None:
            return _train(spark, config, name, wanted)
        source = with_absolute_path(ModelConfig(path=wanted.path, revision=wanted.revision))
        return run_on_executor(spark, functools.partial(_copied, name, source, wanted.document_separator))

    return _ensure(config, name, f"tokenizers.{name}", fingerprint("tokenizer", wanted), make)


def ensure_model_tokenizer(spark: "SparkSession", config: ExperimentConfig, alias: str) -> PackTokenizer:
    """Returns the tokenizer of a scored model, with that model's document separator; copies it if need be.

    Args:
        spark: a session.
        config: the experiment.
        alias: alias of the model.

    Raises:
        ConfigError: the model has no path, its separator has to be set, or a tokenizer has the same name.
        ModelLoadError: the model is not there, or has no fast tokenizer.
    """
    model = config.models[alias]
    if alias in config.tokenizers:
        raise ConfigError(f"tokenizers.{alias}: expected a name that is no model alias; rename this tokenizer")
    if model.path is None:
        raise ConfigError(f"reference.tokenizer: expected a model with a path, found {alias!r}, which has none")
    located = with_absolute_path(model)
    identity = fingerprint("model", model.path, model.revision, model.document_separator)

    def make() -> PackTokenizer:
        return run_on_executor(spark, functools.partial(_copied_from_model, alias, located))

    return _ensure(config, alias, f"models.{alias}", identity, make)


# --- the folder ---


def _ensure(
    config: ExperimentConfig, name: str, key: str, identity: str, make: Callable[[], PackTokenizer]
) -> PackTokenizer:
    """Reads the folder of a tokenizer, or makes it if there is none or it was made for another config.

    Args:
        config: the experiment.
        name: name of the tokenizer.
        key: the key of the config that describes the tokenizer, for messages.
        identity: fingerprint of that part of the config.
        make: makes the tokenizer.
    """
    uri = config.layout.tokenizer(name)
    record = read_tokenizer_record(uri)
    if record is not None and record.fingerprint == identity:
        with fsspec.open(storage.join(uri, TOKENIZER_FILE), "rb") as handle:
            content = handle.read()
        return PackTokenizer(
            name=name,
            content=content,
            document_separator=record.document_separator,
            document_separator_id=record.document_separator_id,
            vocab_size=record.vocab_size,
        )
    if record is not None:
        LOGGER.warning("%s: its config changed: the tokenizer is made again, and the corpora packed with it", key)
    tokenizer = make()
    _save(uri, tokenizer, identity)
    LOGGER.info("%s: %d entries, %s", key, tokenizer.vocab_size, storage.redact(uri))
    return tokenizer


def _save(uri: str, tokenizer: PackTokenizer, identity: str) -> None:
    # A trained student is not a chat model, even if its tokenizer comes from one: its eos_token is the separator.
    for_transformers = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.document_separator,
        # Packed sequences have no BOS, even if the post-processor of a copied tokenizer.json adds one.
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    record = TokenizerRecord(
        document_separator=tokenizer.document_separator,
        document_separator_id=tokenizer.document_separator_id,
        tokenizer_hash=tokenizer.tokenizer_hash,
        vocab_size=tokenizer.vocab_size,
        fingerprint=identity,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.content)
        storage.write_json(str(folder / "tokenizer_config.json"), for_transformers)
        storage.write_json(str(folder / TOKENIZER_RECORD_FILE), dataclasses.asdict(record))
        storage.upload_folder(folder, uri, last=[TOKENIZER_RECORD_FILE])


# --- on an executor ---


def _loaded(content: bytes) -> Any:
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(content)
        return load_tokenizer(Path(folder))


def _checked(name: str, key: str, content: bytes, separator: str) -> PackTokenizer:
    """Checks a tokenizer.json and returns its tokenizer.

    Args:
        name: name of the tokenizer.
        key: the key of the config that describes the tokenizer, for messages.
        content: the bytes of tokenizer.json.
        separator: the token that ends a document.

    Raises:
        ConfigError: the separator is not one token, or the tokenizer loses a part of a text, so that no model trained
            with it can be evaluated on every byte.
        ModelLoadError: the tokenizer cannot be loaded.
    """
    from miniplm_udf.scoring.tokenizer_checks import lost_differences

    tokenizer = _loaded(content)
    lost = lost_differences(tokenizer)
    if lost:
        raise ConfigError(
            f"{key}: expected a tokenizer that keeps all of a text, found one that drops or merges "
            f"{', '.join(lost)}; train with another tokenizer"
        )
    separator_id = tokenizer.token_to_id(separator)
    if separator_id is None:
        raise ConfigError(
            f"{key}.document_separator: expected one token of the tokenizer, found {separator!r}, which is not one; "
            "set it to the tokenizer's token that ends documents"
        )
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return PackTokenizer(name, content, separator, separator_id, vocab_size)


def _copied(name: str, source: ModelConfig, separator: str) -> PackTokenizer:
    """Returns the tokenizer at the path of `tokenizers.<name>`."""
    from miniplm_udf.scoring.model_files import model_folder

    assert source.path is not None
    # A local folder needs a tokenizer.json alone; any other path follows the rules for models.
    folder = Path(storage.local_path(source.path)) if storage.is_local(source.path) else None
    if folder is None or not (folder / TOKENIZER_FILE).is_file():
        folder = model_folder(source)
    return _checked(name, f"tokenizers.{name}", (folder / TOKENIZER_FILE).read_bytes(), separator)


def _copied_from_model(alias: str, model: ModelConfig) -> PackTokenizer:
    """Returns the tokenizer of a model, with the model's document separator."""
    from miniplm_udf.scoring.model_files import model_folder
    from miniplm_udf.scoring.models import describe

    separator = describe(alias, model).document_separator
    return _checked(alias, f"models.{alias}", (model_folder(model) / TOKENIZER_FILE).read_bytes(), separator)


# --- training ---


def _train(spark: "SparkSession", config: ExperimentConfig, name: str, wanted: TokenizerConfig) -> PackTokenizer:
    """Trains on `pool` texts in the order of their ids, a random order, up to `train_bytes` of UTF-8."""
    from pyspark.sql import functions as F

    pool = tables.read(spark, config.layout.table("instances")).where("split = 'pool'")
    (total_bytes,) = pool.agg(F.sum("n_bytes")).collect()[0]
    if not total_bytes:
        raise CorpusError(
            f"tokenizers.{name}: expected `pool` text to train the tokenizer on, found none in "
            f"{storage.redact(config.layout.table('instances'))}; run ingest, or lower ingest.split's shares"
        )
    share = wanted.train_bytes * _SAMPLE_MARGIN / total_bytes
    if share < 1:
        pool = pool.where(F.col("instance_id") < f"{int(share * 16**8):08x}")
    texts = pool.select("instance_id", "text").repartition(1).sortWithinPartitions("instance_id")
    LOGGER.info("tokenizers.%s: training on %d bytes", name, min(int(total_bytes), wanted.train_bytes))
    return run_over_rows(texts, functools.partial(_trained, name, wanted))


def _trained(name: str, wanted: TokenizerConfig, batches: Iterator["pa.RecordBatch"]) -> PackTokenizer:
    """Trains on the first `train_bytes` of the rows' texts. On an executor."""

    def texts() -> Iterator[str]:
        bytes_left = wanted.train_bytes
        for batch in batches:
            for text in batch.column("text").to_pylist():
                if bytes_left <= 0:
                    return
                bytes_left -= len(text.encode("utf-8"))
                yield text

    content = train_bpe(texts(), wanted.vocab_size, wanted.document_separator)
    return _checked(name, f"tokenizers.{name}", content, wanted.document_separator)


def train_bpe(texts: Iterator[str], vocab_size: int, document_separator: str) -> bytes:
    """Trains a byte-level BPE, whose only special token is the separator.

    The tokenizer encodes every text, and decoding returns the text byte for byte. The same texts in the same order give
    the same bytes.

    Args:
        texts: the training text.
        vocab_size: entries of the vocabulary. Too little text gives fewer entries; the 256 bytes and the separator are
            always among them.
        document_separator: the special token.

    Returns:
        The bytes of tokenizer.json.
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
