"""The result of scoring one text: a `Score`, or a `Failure` with its reason. Plain data; loads nothing."""

import dataclasses


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
    """A text that could not be scored.

    Attributes:
        reason: a fixed word, as in the column `rejects.reason`.
        detail: what happened, for people.
    """

    reason: str
    detail: str
