"""Two checks on a loaded model: how its scores depend on the batch, and which windows must not share a batch.

`length_limit` reads from the config the length at which a rotary embedding changes its frequencies for the whole
batch; the scorer keeps shorter and longer windows apart (`windows.batches`). `check_batching` scores a few short
sequences alone and together, and refuses a model whose numbers differ: it also attends to later tokens, or draws random
numbers. Input: a transformers model. Executor side; a retry gives the same answer.
"""

from collections.abc import Iterator
from typing import Any

import torch

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.head import Head
from miniplm_udf.storage import Json

# Tokens in the sequences of the test: short, and of different lengths.
_TEST_LENGTHS = (5, 12, 21)
# Largest mean difference of a sequence, in nats a token. Measured on SmolLM2-135M: 6e-6 in float32, 0.10 in bfloat16,
# 0.21 in float8.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.5


def length_limit(model: Any, context_tokens: int) -> int | None:
    """The length that separates a model's windows: shorter and longer windows must not share a batch.

    transformers picks the frequencies of a `longrope` embedding by the longest sequence of a batch, for all its
    sequences: one set up to the limit, another above it. `dynamic` frequencies change with every token above the limit
    and stay changed for the next batch, so no window may be longer.

    Args:
        model: a loaded model of transformers.
        context_tokens: length of the longest input, with the BOS in front.

    Returns:
        The limit in tokens; None if a batch may mix all lengths up to `context_tokens`.

    Raises:
        ModelLoadError: the config does not state the limit, or windows would be longer than a `dynamic` limit.
    """
    config = model.config.get_text_config()
    limits = set()
    for kind, parameters in _rope_parameters(config):
        if "dynamic" in kind:
            limit = getattr(config, "max_position_embeddings", None)
            if limit is None or context_tokens > limit:
                raise ModelLoadError(
                    f"{type(model).__name__}: its rotary embedding ({kind!r}) gives a text of more than {limit} tokens "
                    f"a score that depends on the texts before it; expected context_tokens of at most "
                    f"max_position_embeddings ({limit}), found {context_tokens}"
                )
        elif kind in ("longrope", "su"):
            name = "original_max_position_embeddings"
            limits.add(parameters.get(name) or getattr(config, name, None))
    limits = {limit for limit in limits if limit is None or limit < context_tokens}
    if None in limits or len(limits) > 1:
        raise ModelLoadError(
            f"{type(model).__name__}: its rotary embedding depends on the longest text of a batch; expected one "
            f"original_max_position_embeddings in config.json that says from which length, found "
            f"{sorted(str(limit) for limit in limits)}"
        )
    return limits.pop() if limits else None


def _rope_parameters(config: Any) -> Iterator[tuple[str, Json]]:
    """The type and the parameters of each rotary embedding of a model; each type of layer may have its own."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for group in (parameters, *parameters.values()):
        if isinstance(group, dict):
            kind = group.get("rope_type", group.get("type"))
            if isinstance(kind, str):
                yield kind, group


def check_batching(model: Any, description: ModelDescription) -> None:
    """Scores short sequences of random ids alone, together, and alone again: five passes of at most 63 tokens.

    Cannot see a difference that begins at a greater length; `length_limit` covers the known case.

    Args:
        model: a loaded model of transformers.
        description: the model's vocabulary and context.

    Raises:
        ModelLoadError: no length fits (see `length_limit`); or a sequence's scores differ by more than rounding.
    """
    head = Head(model)
    context = description.longest_input_tokens
    longest = min(context, length_limit(model, context) or _TEST_LENGTHS[-1])
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(0, description.vocab_size, (min(length, longest) + 1,), generator=generator)
        for length in _TEST_LENGTHS
    ]
    with torch.inference_mode():
        alone = [_nll(head, [sequence], model.device)[0] for sequence in sequences]
        together = _nll(head, sequences, model.device)
        again = _nll(head, sequences[:1], model.device)[0]
    tolerance = _TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_HALF
    difference = max(float((left - right).abs().mean()) for left, right in zip(alone, together, strict=True))
    repeated = float((alone[0] - again).abs().mean())
    if difference <= tolerance and repeated <= tolerance:
        return
    reason = (
        "the same text gets another score each time (dropout or noise that eval() does not switch off, or a state "
        "that it keeps between texts)"
        if repeated > tolerance
        else "a text's scores depend on the other texts of its batch (attention to what follows, as in encoders, or "
        "statistics over the batch)"
    )
    raise ModelLoadError(
        f"{type(model).__name__}: expected the same scores alone and together with longer texts, found a difference of "
        f"{max(difference, repeated):.3g} nats a token: {reason}; take a model that predicts each token only from the "
        f"tokens before it"
    )


def _nll(head: Head, sequences: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """-log p of each sequence's tokens except the first, float32, from one pass with padding (0) on the right."""
    ids_BT = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device)
    log_p_BTV = torch.log_softmax(head.logits(head.hidden(ids_BT[:, :-1])), dim=-1)
    nll_BT = -log_p_BTV.gather(2, ids_BT[:, 1:, None].to(log_p_BTV.device)).squeeze(2).cpu()
    return [row_T[: len(sequence) - 1] for row_T, sequence in zip(nll_BT, sequences, strict=True)]
