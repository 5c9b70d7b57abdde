"""What a scored model is, as plain data: its identity, its special tokens and its limits. Loads nothing heavy.

Owns `ModelDescription`, its JSON form (`<root>/models/<alias>.json`) and `model_revision`, the hash of all that changes
a score. Refuses to look at model files: `models.describe` does, on an executor; the driver keeps the JSON. Pure.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from miniplm_udf import storage
from miniplm_udf.config import ModelConfig, fingerprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model as it scores.

    Attributes:
        model_id: alias in the config.
        model_revision: 32 hex digits over all that changes a score.
        tokenizer_hash: 32 hex digits over tokenizer.json.
        dtype: of the forward pass.
        context_tokens: longest input of one forward pass.
        window_overlap_tokens: tokens that consecutive windows share.
        context_prefix: none (official arithmetic) or token.
        document_separator: the end-of-document token.
        document_separator_id: its id.
        prefix_token_id: id of the token in front; None with `context_prefix: none`.
        vocab_size: rows of the model's embedding.
        n_parameters: tensors' elements in the weight files.
        weights_hash: hash of the weight files, config.json and code of its own, or of the .gguf file.
        path: where it came from, without secrets.
        warnings: what a reader of the scores should know (chat-tuned, quantised).
    """

    model_id: str
    model_revision: str = ""
    tokenizer_hash: str
    dtype: Literal["float32", "bfloat16"]
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
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.model_revision:
            object.__setattr__(self, "model_revision", self._revision())

    def _revision(self) -> str:
        return fingerprint(
            [
                self.weights_hash,
                self.tokenizer_hash,
                self.dtype,
                self.document_separator_id,
                self.prefix_token_id,
                self.context_prefix,
                self.context_tokens,
                self.window_overlap_tokens,
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "ModelDescription":
        """The description of plain data; keys of a later version are left out."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in plain.items() if key in known})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        return cls.from_dict(json.loads(text))


def with_absolute_path(config: ModelConfig) -> ModelConfig:
    """The config with a path that means the same in another working directory: for the driver, before it ships one.

    A bare path that exists becomes an absolute `file:` URI; hub names, URIs and `package:` paths stay.
    """
    if config.path is None or config.path.startswith("package:") or not Path(config.path).expanduser().exists():
        return config
    return dataclasses.replace(config, path=storage.to_uri(config.path))
