"""Our attention: equal to transformers' own, used where it is, and without a mask inside a compiled model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miniplm_udf.scoring import attention
from tests.support import tiny_models
from tests.support.causal_types import tiny_config


def plain(tmp_path: Path, family: str = "llama", **changes: Any) -> Any:
    folder = tiny_models.make_model_folder(tmp_path, family, max_position_embeddings=1024, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 200, 800])
def test_equals_sdpa(tmp_path: Path, n_tokens: int) -> None:
    model = plain(tmp_path)
    input_BT = torch.randint(0, tiny_models.VOCAB_SIZE, (3, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=input_BT, use_cache=False).logits
        attention.improve_attention(model)
        found = model(input_ids=input_BT, use_cache=False).logits
    assert model.config._attn_implementation == "miniplm_blocked"
    assert float((expected - found).abs().max()) < 1e-5


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    model = plain(tmp_path, "gemma3_text", sliding_window=16)
    input_BT = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=input_BT, use_cache=False).logits
        attention.improve_attention(model)
        found = model(input_ids=input_BT, use_cache=False).logits
    assert float((expected - found).abs().max()) < 1e-4


def test_a_model_that_ours_gets_wrong_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **others: Any) -> tuple[torch.Tensor, None]:
        found, _ = right(*arguments, **others)
        return found + 1, None

    right = attention.blocked_attention
    monkeypatch.setattr(attention, "blocked_attention", wrong)
    model = plain(tmp_path)
    attention.improve_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_with_the_mask_keeps_its_own() -> None:
    """DeepSeek-V3.2 chooses keys by the mask, and fails where it is None."""
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v32")).eval()
    attention.improve_attention(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        assert model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False).logits.isfinite().all()


@pytest.mark.slow
def test_a_compiled_model_needs_no_mask(tmp_path: Path) -> None:
    """Dynamo alone: what it would hand to a compiler, with no compiler behind it."""
    seen: list[bool] = []

    def spy(*arguments: Any, **others: Any) -> tuple[torch.Tensor, None]:
        seen.append(arguments[4] is None if len(arguments) > 4 else others["attention_mask"] is None)
        return attention.blocked_attention(*arguments, **others)

    model = plain(tmp_path)
    attention.improve_attention(model)
    from transformers import AttentionInterface

    AttentionInterface.register("miniplm_blocked", spy)
    try:
        compiled = torch.compile(model.base_model, backend="eager", dynamic=True)
        with torch.inference_mode():
            compiled(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False)
    finally:
        AttentionInterface.register("miniplm_blocked", attention.blocked_attention)
    assert seen
    assert all(seen)
