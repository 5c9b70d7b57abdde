"""The description of a scored model as plain data: its identity, special tokens and limits. Loads nothing heavy.

Owns `ModelDescription`, its JSON form (`<root>/models/<alias>.json`) and `model_revision`, the hash of everything that
changes a score. Reads no model files: `models.describe` does, on an executor; the driver keeps the JSON. Pure.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from miniplm_udf import storage
from miniplm_udf.config.experiment import fingerprint
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model and the settings that it scores with.

    Attributes:
        model_id: the model's alias in the config.
        model_revision: hash of everything that changes a score, 32 hex digits.
        tokenizer_hash: hash of tokenizer.json, 32 hex digits.
        dtype: dtype of the forward pass; `float8`: bfloat16 with linear layers in float8 (`scoring.float8`);
            `server` for a model on a server, which does not say.
        context_tokens: longest input of one forward pass, without the BOS.
        window_overlap_tokens: tokens that consecutive windows share.
        context_prefix: none (official arithmetic) or token.
        document_separator: the end-of-document token.
        document_separator_id: id of the end-of-document token.
        prefix_token_id: id of the token in front of a text; None with `context_prefix: none`.
        bos_token: the token in front of every window, as in the model's pre-training; None for no token.
        bos_token_id: id of the BOS; None for no token.
        prefix: the tokens in front of a text and the reason for them, in words.
        vocab_size: rows of the model's embedding.
        n_parameters: elements of the tensors in the weight files; for a model on a server, weights by its
            config.json, 0 if it does not say.
        weights_hash: hash of the weight files, config.json and the model's own code, or of the .gguf file; for a model
            on a server, of the name and the revision that the config gives it.
        path: where the model came from, without secrets.
        warnings: facts that a reader of the scores should know (chat-tuned, quantised).
    """

    model_id: str
    model_revision: str = ""
    tokenizer_hash: str
    dtype: Literal["float32", "bfloat16", "float8", "server"]
    context_tokens: int
    window_overlap_tokens: int
    context_prefix: Literal["none", "token"]
    document_separator: str
    document_separator_id: int
    prefix_token_id: int | None
    vocab_size: int
    n_parameters: int
    weights_hash: str
    path: str
    bos_token: str | None = None
    bos_token_id: int | None = None
    prefix: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.model_revision:
            object.__setattr__(self, "model_revision", self._revision())

    def _revision(self) -> str:
        facts = [
            self.weights_hash,
            self.tokenizer_hash,
            self.dtype,
            self.document_separator_id,
            self.prefix_token_id,
            self.context_prefix,
            self.context_tokens,
            self.window_overlap_tokens,
        ]
        # Without a BOS the revision is the same as in releases that did not support a BOS, so old scores stay valid.
        return fingerprint(facts if self.bos_token_id is None else [*facts, f"bos {self.bos_token_id}"])

    @property
    def is_served(self) -> bool:
        """Whether a server runs the model."""
        return self.dtype == "server"

    @property
    def longest_input_tokens(self) -> int:
        """Tokens of the longest forward pass: a window, and the BOS in front."""
        return self.context_tokens + (0 if self.bos_token_id is None else 1)

    def to_dict(self) -> Json:
        """Returns the fields as plain values for a JSON record; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Json) -> "ModelDescription":
        """Returns the description in the JSON of a record; ignores keys of a later version.

        Args:
            plain: the result of `to_dict`.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in plain.items() if key in names})


def settled_dtype(record: Json | None) -> str | None:
    """Returns the dtype that a model's record settles for its later scores.

    Args:
        record: the model's record; None if it has none.

    Returns:
        The dtype; None without a record, or if a server made the scores, which says nothing of a dtype here.
    """
    return None if record is None or record["dtype"] == "server" else str(record["dtype"])


def with_absolute_path(config: ModelConfig) -> ModelConfig:
    """Returns the config with a path that means the same in any working directory, to be sent to executors.

    A bare path that exists becomes an absolute `file:` URI; hub names, URIs and `package:` paths stay as they are.

    Args:
        config: where the model is.
    """
    if config.path is None or config.path.startswith("package:") or not Path(config.path).expanduser().exists():
        return config
    return dataclasses.replace(config, path=storage.to_uri(config.path))
