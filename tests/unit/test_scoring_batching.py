"""A text's score does not depend on its batch: rotary embeddings that look at the longest text, and models refused.

The right value is a pass of the plain transformers model over one window, in a batch of its own.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.batching import check_batching, length_limit
from miniplm_udf.scoring.results import Score
from tests.support.scoring_oracles import Row, plain_model, plain_tokenizer, score
from tests.support.tiny_models import make_model, make_model_folder, make_scorer

# From this length on the rotary embeddings of the tests change.
LIMIT, CONTEXT = 16, 64
_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": _FACTORS | {"original_max_position_embeddings": LIMIT},
    "dynamic": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": LIMIT},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LIMIT,
    },
    "proportional": {"factor": 4.0, "partial_rotary_factor": 0.5},
}
# Shorter than the limit, just at it and above it, two of one length, and one of three windows.
LENGTHS = (3, 16, 17, 18, 30, 30, 64, 65, 5, 150)


def rope(kind: str) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0, **ROPES[kind]}


def texts() -> list[Row]:
    """Texts of so many tokens: no merge joins these letters."""
    generator = random.Random(0)
    return [("".join(generator.choices("qzjv", k=length)), [], False) for length in LENGTHS]


def made_scorer(parent: Path, family: str, **changes: Any) -> tuple[Path, Any]:
    folder = make_model_folder(parent, family, **changes)
    scorer = make_scorer(folder, 100_000, context_tokens=CONTEXT, window_overlap_tokens=0, context_prefix="token")
    return folder, scorer


@torch.inference_mode()
def plain_nll(folder: Path, row: Row) -> float:
    """Windows of CONTEXT tokens, each alone through a model that was loaded for it."""
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    ids = [0, *tokenizer(row[0], add_special_tokens=False).input_ids]
    total = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        logits = model(input_ids=torch.tensor([window[:-1]]), use_cache=False).logits[0].double()
        total -= float(torch.log_softmax(logits, -1).gather(1, torch.tensor(window[1:])[:, None]).sum())
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in ROPES), ("phi3", "longrope"), ("phimoe", "longrope")]
)
def test_rotary_embeddings(tmp_path: Path, family: str, kind: str) -> None:
    """Alone, with all others, in the opposite order, and again after longer texts: one number, and the right one."""
    parameters = rope(kind)
    if family == "phimoe":
        parameters |= {"short_mscale": 1.1, "long_mscale": 1.3}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": CONTEXT, "rope_parameters": parameters}
    if family == "phi3":  # this key goes before that of rope_parameters
        sizes |= {"original_max_position_embeddings": LIMIT}
    folder, scorer = made_scorer(tmp_path, family, **sizes)
    rows = texts()
    expected = [plain_nll(folder, row) for row in rows]
    alone = [score(scorer, [row])[0] for row in rows]
    found = [alone, score(scorer, rows), score(scorer, rows[::-1])[::-1], [score(scorer, [row])[0] for row in rows]]
    for scores in found:
        for one, length, nats in zip(scores, LENGTHS, expected, strict=True):
            assert isinstance(one, Score)
            assert one.n_tokens == length
            assert one.nll_sum_nats == pytest.approx(nats, abs=1e-5 * length)
    if kind == "longrope":
        # The test sees the fault: with the other frequencies the short texts have other scores.
        scorer._length_limit = None
        mixed = score(scorer, rows)
        assert abs(mixed[1].nll_sum_nats - expected[1]) > 1e-3


# --- models that are refused ---


def test_dynamic_frequencies_beyond_the_original_context_are_refused() -> None:
    model = make_model("llama", max_position_embeddings=CONTEXT, rope_parameters=rope("dynamic"))
    assert length_limit(model, CONTEXT) is None
    with pytest.raises(ModelLoadError, match=r"LlamaForCausalLM: .*'dynamic'.* at most .*\(64\), found 65"):
        length_limit(model, CONTEXT + 1)


def test_a_limit_that_is_not_stated_is_refused() -> None:
    model = make_model("llama", max_position_embeddings=CONTEXT)
    # A model with code of its own need not have transformers' names.
    del model.config.rope_parameters
    model.config.rope_scaling = {"type": "su", **_FACTORS}
    with pytest.raises(ModelLoadError, match=r"original_max_position_embeddings in config\.json"):
        length_limit(model, CONTEXT)
    model.config.original_max_position_embeddings = LIMIT
    assert length_limit(model, CONTEXT) == LIMIT
    assert length_limit(model, LIMIT) is None


def test_layers_of_different_types_have_one_limit() -> None:
    model = make_model("llama", max_position_embeddings=CONTEXT)
    longrope = rope("longrope")
    model.config.rope_parameters = {"full_attention": longrope, "sliding_attention": {"rope_type": "default"}}
    assert length_limit(model, CONTEXT) == LIMIT
    model.config.rope_parameters["sliding_attention"] = longrope | {"original_max_position_embeddings": 20}
    with pytest.raises(ModelLoadError, match=r"found \['16', '20'\]"):
        length_limit(model, CONTEXT)


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    """Gemma 3 as its embedding models have it."""
    with pytest.raises(
        ModelLoadError, match=r"Gemma3ForCausalLM: .*other texts of its batch .*attention to what follows"
    ):
        made_scorer(tmp_path, "gemma3_text", use_bidirectional_attention=True)


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    _, scorer = made_scorer(tmp_path, "llama")
    model = make_model("llama")
    check_batching(model, scorer.description)
    model.model.layers[0].mlp.register_forward_hook(lambda *arguments: arguments[2] + torch.randn_like(arguments[2]))
    with pytest.raises(ModelLoadError, match="another score each time"):
        check_batching(model, scorer.description)
