"""The sections of an experiment, one frozen dataclass each, checked when they are made.

Owns the keys, their defaults (the paper's recipe, arXiv 2410.17215) and the checks of single sections; no other module
has defaults. A section does not know another one: `experiment.ExperimentConfig` checks the links between sections.
Sections of annotation, refinement, training, evaluation and tracking are in annotate.py, refine.py, training.py,
evaluate.py and tracking.py. Imports nothing heavy.
"""

import dataclasses
import re
import urllib.parse
from typing import Literal

from miniplm_udf.config.values import FOLLOWS, follows, name_problem
from miniplm_udf.errors import ConfigError


def check(condition: bool, message: str) -> None:
    """Raises a `ConfigError` with the `message`, unless the `condition` holds."""
    if not condition:
        raise ConfigError(message)


def _check_share(key: str, share: float) -> None:
    check(0 <= share <= 1, f"{key}: expected a share of 0 to 1, found {share}")


def check_name(kind: str, name: str) -> None:
    """Refuses a `name` that cannot be part of a column or table name; `kind` says what it names, for the message."""
    message = name_problem(kind, name)
    check(message is None, message or "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A server with OpenAI's completions endpoint, which runs a model. The key is `OPENAI_API_KEY` of the environment.

    Attributes:
        url: base URL of the endpoint, such as `http://host:8000/v1`.
        model: name of the model on the server.
        revision: what is known of the server's weights, such as a commit; a part of the model's revision.
        requests: requests at the same time, of each worker.
        windows: windows of text in one request.
        timeout_seconds: time for the answer to one try of a request.
        patience_seconds: for how long a request is repeated while the server cannot be reached, is busy or fails. The
            first request, which asks whether the server can score, is repeated for 30 s at most.
    """

    url: str
    model: str
    revision: str = ""
    requests: int = 8
    windows: int = 8
    timeout_seconds: float = 600.0
    patience_seconds: float = 600.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        check(
            "@" not in parts.netloc and not parts.query and not parts.fragment,
            "server.url: expected no user, password, query or fragment, which records would show; the key is "
            "OPENAI_API_KEY of the environment",
        )
        check(
            re.fullmatch(r"https?://[^/:]+(:\d+)?(/.*)?|https?://\[[^]]+\](:\d+)?(/.*)?", self.url) is not None,
            f"server.url: expected http(s)://HOST[:PORT]/v1, found {self.url!r}",
        )
        check(bool(self.model), "server.model: expected the name of the model on the server, found nothing")
        for key in ("requests", "windows"):
            check(getattr(self, key) >= 1, f"server.{key}: expected at least 1, found {getattr(self, key)}")
        check(self.timeout_seconds > 0, f"server.timeout_seconds: expected more than 0, found {self.timeout_seconds}")
        check(
            self.patience_seconds >= 0, f"server.patience_seconds: expected at least 0, found {self.patience_seconds}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal LM that scores.

    Attributes:
        path: a folder, a hub name, a `.gguf` file, or `package:NAME/FILE` for a file in an installed Python package;
            null for a model that this experiment trains (the reference): `<root>/models/<alias>`.
        revision: commit of a hub model; null takes the newest and records its commit.
        dtype: dtype of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU, fixed at the first scoring.
            float8 is bfloat16 with the decoder's linear layers in float8; never chosen by auto.
        document_separator: the model's pre-training end-of-document token, never a chat token; null takes the
            tokenizer's `eos_token`, if it does not end a chat turn. The model that the section `reference` trains takes
            the separator of the model whose tokenizer it has.
        bos_token: token in front of every window. auto follows the model's tokenizer: the BOS of its pre-training, or
            no token; none adds no token; any other value is the token itself.
        prefix_token: token in front of a text with `context_prefix: token`; null takes the BOS, or
            `document_separator` if there is no BOS.
        context_prefix: none is the official arithmetic; token scores every byte (docs/scoring.md).
        context_tokens: longest input of one forward pass, not counting a BOS.
        window_overlap_tokens: tokens of context that consecutive windows of a longer text share; the default is 256, or
            half of `context_tokens` if that is less.
        trust_remote_code: whether transformers may run Python code that the model's folder contains.
        device_map: auto splits a model that is too large for one GPU over all GPUs of a node (docs/scoring.md); null
            loads it onto one GPU.
        backend: local loads the model; openai asks `server`, and `path` then only needs the model's config.json and
            tokenizer.
        server: the server of `backend: openai`.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    document_separator: str | None = None
    bos_token: str = "auto"
    prefix_token: str | None = None
    context_prefix: Literal["none", "token"] = "none"
    context_tokens: int = 1024
    window_overlap_tokens: int = follows("256, or half of context_tokens if that is less")
    trust_remote_code: bool = False
    device_map: Literal["auto"] | None = None
    backend: Literal["local", "openai"] = "local"
    server: ServerConfig | None = None

    def __post_init__(self) -> None:
        check(
            (self.backend == "openai") == (self.server is not None),
            f"server: expected together with `backend: openai`, found backend {self.backend} "
            f"{'without' if self.server is None else 'with'} a server",
        )
        check(
            self.server is None or not str(self.path).endswith(".gguf"),
            "path: expected a folder or hub name with config.json and the tokenizer of the server's model with "
            f"`backend: openai`, found {self.path}, which would be converted with all its weights",
        )
        check(
            self.server is None or self.dtype == "auto",
            f"dtype: expected auto with `backend: openai`, whose server chooses the dtype, found {self.dtype}",
        )
        check(
            self.device_map is None or self.server is None,
            "device_map: expected null with `backend: openai`, whose server places its model, found auto",
        )
        check(self.context_tokens >= 2, f"context_tokens: expected at least 2, found {self.context_tokens}")
        if self.window_overlap_tokens == FOLLOWS:
            object.__setattr__(self, "window_overlap_tokens", min(256, self.context_tokens // 2))
        check(
            0 <= self.window_overlap_tokens < self.context_tokens,
            f"window_overlap_tokens: expected 0 to context_tokens - 1 ({self.context_tokens - 1}), "
            f"found {self.window_overlap_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Names of the input's fields. The input may lack `id` and `source`; the fields in `metadata` are copied.

    Attributes:
        id: field with the id of a document; without it, the id is a hash of the text.
        text: field with the text.
        source: field with the domain; without it, the domain is `ingest.default_source` (of text files, their folder).
        metadata: fields that are copied into the column `metadata` of `instances`.
    """

    id: str = "id"
    text: str = "text"
    source: str = "source"
    metadata: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """How documents become instances (the rule: `ingestion/chunking.py`).

    Attributes:
        mode: document cuts each document by itself; packed cuts runs of documents joined by separators.
        tokenizer: alias of the model whose tokens `max_tokens` counts.
        max_tokens: most tokens of an instance.
        split_bytes: size of the input splits, in bytes; in mode packed each split is packed by itself.
    """

    mode: Literal["document", "packed"] = "packed"
    tokenizer: str = "teacher"
    max_tokens: int = 1025
    split_bytes: int = 128 * 1024 * 1024

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, f"chunking.max_tokens: expected at least 2, found {self.max_tokens}")
        check(self.split_bytes >= 1024, f"chunking.split_bytes: expected at least 1024, found {self.split_bytes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of documents for the splits `reference` and `heldout`, by a hash of their text; the rest is `pool`.

    Attributes:
        reference: share on which the reference is trained.
        heldout: share on which trained models are evaluated.
    """

    reference: float = 0.05
    heldout: float = 0.01

    def __post_init__(self) -> None:
        check(
            self.reference >= 0 and self.heldout >= 0 and self.reference + self.heldout < 1,
            f"split: expected shares of at least 0 that sum to less than 1, found {self.reference} + {self.heldout}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Where the input is and how it is read.

    Attributes:
        input: paths, folders or globs of files of one format, the location of one Delta table, or hf://datasets/NAME.
        format: auto tells the format from the file names (docs/ingest.md) or from a `_delta_log`.
        fields: names of the input's fields.
        default_source: source of documents whose input has none; text files in a folder of the input have its name.
        chunking: how documents become instances.
        split: which documents are set aside.
        state_partitions: partitions of the deduplication state; cannot change after the query's first start.
        max_files_per_trigger: most files in one micro-batch.
        max_reject_share: if a higher share of the rows is rejected, the command ends with exit code 3.
    """

    input: list[str] | str = dataclasses.field(default_factory=list)
    format: Literal["auto", "jsonl", "parquet", "text", "json", "arrow", "delta"] = "auto"
    fields: FieldsConfig = dataclasses.field(default_factory=FieldsConfig)
    default_source: str = "unknown"
    chunking: ChunkingConfig = dataclasses.field(default_factory=ChunkingConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    state_partitions: int = 8
    max_files_per_trigger: int = 1000
    max_reject_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("state_partitions", "max_files_per_trigger"):
            check(getattr(self, name) >= 1, f"ingest.{name}: expected at least 1, found {getattr(self, name)}")
        _check_share("ingest.max_reject_share", self.max_reject_share)

    @property
    def inputs(self) -> list[str]:
        """`input` as a list."""
        return [self.input] if isinstance(self.input, str) else list(self.input)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How instances are scored.

    Attributes:
        models: aliases to score with; empty means all of `models`.
        sample: share of the pool to score, chosen by a hash of the instance's id. A larger share contains a smaller
            one, so that raising it later scores only what is missing. A proxy can rank the rest (section `proxy`).
        workers: concurrent scorers: one per GPU; 1 on a machine without a GPU.
        workers_per_gpu: worker processes that may hold a model on one GPU at a time; others wait. Null: no limit.
        tokens_per_batch: most tokens of one forward pass; null searches the best number for the GPU and keeps it in
            the model's record, and takes 1,024 on a CPU.
        compile: whether torch compiles the layers of models, in the background; null does so on a GPU only.
        attention: attention backend of transformers; auto lets transformers choose.
        max_bytes_per_trigger: size of a micro-batch, as bytes of the instances' files: 512m, 1g.
        max_reject_share: if a higher share of (instance, model) pairs is rejected, the command ends with exit code 3.
    """

    models: list[str] = dataclasses.field(default_factory=list)
    sample: float = 1.0
    workers: int = 1
    workers_per_gpu: int | None = 1
    tokens_per_batch: int | None = None
    compile: bool | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    max_bytes_per_trigger: str = "1g"
    max_reject_share: float = 0.01

    def __post_init__(self) -> None:
        check(0 < self.sample <= 1, f"score.sample: expected a share above 0 and at most 1, found {self.sample}")
        _check_share("score.max_reject_share", self.max_reject_share)
        check(
            self.tokens_per_batch is None or self.tokens_per_batch >= 1,
            f"score.tokens_per_batch: expected at least 1, found {self.tokens_per_batch}",
        )
        for name in ("workers", "workers_per_gpu"):
            number = getattr(self, name)
            check(number is None or number >= 1, f"score.{name}: expected at least 1, found {number}")
        check(
            re.fullmatch(r"\d+[bkmgt]?b?", self.max_bytes_per_trigger.lower()) is not None,
            f"score.max_bytes_per_trigger: expected a size such as 512m or 1g, found {self.max_bytes_per_trigger!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """A small regressor that predicts, from the text alone, the score of instances that no model has scored.

    Attributes:
        score: SQL over `score_matrix` that the proxy predicts; null is the rule miniplm.
        rows: approximate number of scored instances, drawn by a hash of their ids, to fit and to test the proxy. It has
            an upper limit because a single task fits the proxy, so that every fit gives the same result.
        heldout: share of these instances that only test the proxy.
        features: size of the feature vector into which n-grams of words are hashed.
    """

    score: str | None = None
    rows: int = 100_000
    heldout: float = 0.2
    features: int = 2**18

    def __post_init__(self) -> None:
        check(0 < self.heldout < 1, f"proxy.heldout: expected a share between 0 and 1, found {self.heldout}")
        check(1 <= self.rows <= 10**6, f"proxy.rows: expected 1 to 1000000, found {self.rows}")
        check(1 <= self.features <= 2**24, f"proxy.features: expected 1 to {2**24}, found {self.features}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How the streaming queries of ingest and score run.

    Attributes:
        trigger: available_now ends once all input is read; processing_time keeps running.
        interval_seconds: how often processing_time checks for new rows.
        stalled_seconds: a micro-batch without any progress for this long is reported.
        metrics_port: port of the driver that serves what `miniplm status --prometheus` prints; null serves nothing.
    """

    trigger: Literal["available_now", "processing_time"] = "available_now"
    interval_seconds: float = 10.0
    stalled_seconds: float = 600.0
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        interval = self.interval_seconds
        check(interval >= 0, f"stream.interval_seconds: expected at least 0, found {interval}")
        port = self.metrics_port
        check(port is None or 1 <= port <= 65535, f"stream.metrics_port: expected 1 to 65535, or null, found {port}")
        check(self.stalled_seconds > 0, f"stream.stalled_seconds: expected more than 0, found {self.stalled_seconds}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A student's tokenizer: loaded from `path`, or a byte-level BPE trained on text of the split `pool`.

    Attributes:
        path: folder or hub name; null trains a BPE.
        revision: commit of a hub tokenizer; null takes the newest.
        vocab_size: size of a trained BPE, with the separator.
        train_bytes: most text, in bytes, that the BPE is trained on.
        document_separator: end-of-document token; the only special token of a trained BPE.
    """

    path: str | None = None
    revision: str | None = None
    vocab_size: int = 8192
    train_bytes: int = 100_000_000
    document_separator: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        # The smallest BPE has the 256 bytes and the separator.
        check(self.vocab_size >= 257, f"vocab_size: expected at least 257, found {self.vocab_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Token sequences for training.

    Attributes:
        sequence_length: input tokens of one training sequence.
        sequences: packed fills each sequence with the texts that follow each other in the stored order; instance makes
            a sequence of each instance and pads it, as the official code does (docs/training.md).
        shards: number of streams that are packed independently; each ends in one padded sequence if they are packed.
    """

    sequence_length: int = 1024
    sequences: Literal["packed", "instance"] = "packed"
    shards: int = 1

    def __post_init__(self) -> None:
        check(self.sequence_length >= 2, f"sequence_length: expected at least 2, found {self.sequence_length}")
        check(self.shards >= 1, f"pack.shards: expected at least 1, found {self.shards}")
