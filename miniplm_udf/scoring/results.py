"""The result for one text: a `Score` or a `Generation`, or a `Failure` with its reason. Plain data; loads nothing."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Score:
    """The numbers of a scored text.

    Attributes:
        nll_sum_nats: sum of -log p over the scored tokens, in nats.
        n_tokens: scored tokens.
        n_bytes: UTF-8 bytes of text that the scored tokens cover.
    """

    nll_sum_nats: float
    n_tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Failure:
    """A text that could not be scored or continued.

    Attributes:
        reason: a fixed word, as in the column `rejects.reason`.
        detail: what happened, for people.
    """

    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Generation:
    """A text whose beginning a model has continued.

    Attributes:
        token_ids: prompt and continuation, int32 little-endian, without a BOS but with the separator at the end.
        n_prompt_tokens: ids that are the text's own.
        end_reason: eos (the model ended the document), length (it reached the limit), or prompt (the text has no more
            tokens than a prompt, and nothing was generated).
    """

    token_ids: bytes
    n_prompt_tokens: int
    end_reason: Literal["eos", "length", "prompt"]

    @property
    def n_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) // 4 - self.n_prompt_tokens
