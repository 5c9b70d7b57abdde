"""Tests whether a loaded model agrees with the prefix that its files state, on a few plain sentences.

Input: the model, its tokenizer and description. Output: warnings. The sentences are scored twice with the official
arithmetic, without and with a BOS; the scored tokens are the same. A model that never saw a text without its BOS is
wrong by whole nats without it. Executor side, once for each load: about 150 tokens. A retry gives the same result.
"""

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.prefix import named_bos
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer

# A warning is given if the other setting is better by more than this, in nats a token.
MARGIN_NATS = 0.5
# The sentences are one batch.
_TOKENS_PER_BATCH = 1024
SENTENCES = (
    "The train to the coast leaves at seven in the morning and arrives shortly before noon.",
    "She opened the window because the room was warm, and the noise of the street came in.",
    "Water boils at a lower temperature in the mountains, so cooking takes more time there.",
)


def prefix_warnings(
    model: Any, tokenizer: Tokenizer, description: ModelDescription, folder: Path, device: str
) -> list[str]:
    """Returns a warning if plain English has a -log p lower by MARGIN_NATS with the other setting; else an empty list.

    Args:
        model: a loaded model, on `device`.
        tokenizer: the model's tokenizer.
        description: the model's description, which says whether it is scored with a BOS.
        folder: the model's folder, whose files name the BOS of a model that is scored without.
        device: a torch device.
    """
    token = description.bos_token or named_bos(folder, tokenizer) or description.document_separator
    token_id = tokenizer.token_to_id(token)
    if token_id is None or token_id >= description.vocab_size:
        return []
    without = _nats_per_token(model, tokenizer, description, None, device)
    with_token = _nats_per_token(model, tokenizer, description, token_id, device)
    if without is None or with_token is None:
        return []
    here, other = (with_token, without) if description.bos_token else (without, with_token)
    if here - other <= MARGIN_NATS:
        return []
    now, key = ("with", "none") if description.bos_token else ("without", token)
    alias = description.model_id
    return [
        f"{alias}: plain English has {here:.2f} nats a token {now} {token} in front of every window, and {other:.2f} "
        f"the other way ({description.prefix}); if the model was trained that way, set models.{alias}.bos_token: {key}"
    ]


def _nats_per_token(
    model: Any, tokenizer: Tokenizer, description: ModelDescription, token_id: int | None, device: str
) -> float | None:
    """Mean -log p over the sentences' scored tokens, in nats; None if a sentence cannot be scored."""
    changed = dataclasses.replace(
        description, context_prefix="none", prefix_token_id=None, bos_token_id=token_id, model_revision=""
    )
    scorer = Scorer(model, tokenizer, changed, _TOKENS_PER_BATCH, device, compiled=False)
    n = len(SENTENCES)
    results = scorer.score(SENTENCES, [[]] * n, [False] * n)
    scores = [result for result in results if isinstance(result, Score)]
    if len(scores) < n:
        return None
    return sum(score.nll_sum_nats for score in scores) / sum(score.n_tokens for score in scores)
