"""Document masks: positions by hand, documents that do not depend on their neighbours, families that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.targets import reference_target, student_target
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError
from tests.support.trainer_roots import FAMILIES, LLAMA, make_root, write_config
from trainer.loop import Loop, make_optimizer
from trainer.losses.lm_loss import CausalLMWithLoss
from trainer.models.document_masks import check_follows_positions, document_positions
from trainer.models.model import build_model, model_config
from trainer.ranks.distributed import World
from trainer.train import train

SEPARATOR, VOCAB, LENGTH = 3, 40, 12
DEMO = Path(__file__).resolve().parents[2] / "conf" / "demo.yaml"
# a document of 4 tokens with its separator, one of 3, and one without an end of 6; and one token for the last target
TOKENS = [7, 8, 9, SEPARATOR, 11, 12, SEPARATOR, 14, 15, 16, 17, 18, 19]
POSITIONS = [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]


def build(architecture: dict[str, Any] = LLAMA) -> Any:
    config = model_config(architecture, where="x", vocab_size=VOCAB, separator_id=SEPARATOR, max_positions=LENGTH)
    return build_model(config, where="x", seed=0)


def positions(inputs: list[int], mask: list[int]) -> list[int]:
    return document_positions(torch.tensor([inputs]), torch.tensor([mask], dtype=torch.uint8), SEPARATOR)[0].tolist()


def test_positions_by_hand() -> None:
    assert positions(TOKENS[:-1], [1] * LENGTH) == POSITIONS
    assert positions([SEPARATOR, 5, SEPARATOR, SEPARATOR, 6], [1] * 5) == [0, 0, 1, 0, 0]
    # Token 6 does not predict token 7: other text begins there. Nothing predicts padding.
    assert positions([5, 6, 7, 8, SEPARATOR], [1, 0, 1, 1, 1]) == [0, 1, 0, 1, 2]
    assert positions([5, 6, SEPARATOR, SEPARATOR, SEPARATOR], [1, 1, 0, 0, 0]) == [0, 1, 2, 0, 0]
    both = document_positions(torch.tensor([[5, 6], [SEPARATOR, 6]]), torch.ones(2, 2), SEPARATOR)
    assert both.tolist() == [[0, 1], [0, 0]]


class OneRow:
    """One packed sequence; `first` replaces the first token."""

    group_rows, sequence_length = np.array([1]), LENGTH

    def __init__(self, first: int = TOKENS[0]):
        self.tokens = np.array([[first, *TOKENS[1:]]], "i4")

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[rows], np.ones((len(rows), LENGTH), "u1")


def logits_in_training(architecture: dict[str, Any], first: int, **train: Any) -> torch.Tensor:
    """The logits of the loop's own forward pass over one sequence, (T, V)."""
    seen: list[torch.Tensor] = []
    model = build(architecture).eval()
    model.base_model.register_forward_hook(
        lambda module, arguments, output: seen.append(model.lm_head(output[0])[0].detach().clone())
    )
    config = TrainConfig(steps=1, warmup_steps=0, batch_sequences=1, micro_batch_sequences=1, **train)
    module = CausalLMWithLoss(model)
    seen.clear()  # the test of the output layer has run the model, too
    Loop(module, make_optimizer(model, config), OneRow(first), config, SEPARATOR, World()).step(0)
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_document_does_not_depend_on_its_neighbour(family: str) -> None:
    architecture = FAMILIES[family]
    first, other = (logits_in_training(architecture, token, document_masks=True) for token in (7, 30))
    assert not torch.equal(first[:4], other[:4])
    assert torch.equal(first[4:], other[4:])
    model = build(architecture).eval()
    with torch.no_grad():
        for document in (slice(0, 4), slice(4, 7), slice(7, 12)):
            alone = model(input_ids=torch.tensor([TOKENS[document]])).logits[0]
            torch.testing.assert_close(first[document], alone, atol=1e-5, rtol=1e-4)
    # Off, which is the default, every later token depends on the first one, as in the paper.
    plain, plain_other = (logits_in_training(architecture, token) for token in (7, 30))
    assert not torch.equal(plain[4:7], plain_other[4:7])
    assert not torch.equal(plain[7:], plain_other[7:])


def test_models_that_can_be_masked_are_accepted_and_stay_as_they_are() -> None:
    for family in ("llama", "qwen2", "gpt2"):
        model = build(FAMILIES[family])
        model.train()
        check_follows_positions(model, VOCAB, "here")
        assert model.training


def test_a_recurrent_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^train\.document_masks: .*found here, .*set train\.document_masks=false"):
        check_follows_positions(build(FAMILIES["mamba"]), VOCAB, "here")


@pytest.mark.slow
def test_the_trainer_checks_the_model_before_it_trains(tmp_path: Path) -> None:
    make_root(tmp_path)
    config = load_config(
        write_config(tmp_path, tmp_path / "root", document_masks=True),
        [f"students.small.architecture={FAMILIES['mamba'] | {'use_mambapy': False}}"],
    )
    with pytest.raises(ConfigError, match=r"found students\.small\.architecture"):
        train(config, student_target(config, "small"))


def test_models_that_were_trained_before_the_key_existed_stay_finished() -> None:
    demo = load_config(DEMO)
    assert student_target(demo, "miniplm").config_fingerprint() == "a68f5de40aeef49bcb0acf54fc572dc6"
    # The demo's reference had these settings then.
    earlier = "reference.train={steps: 40, batch_sequences: 8, micro_batch_sequences: 8, learning_rate: 1.0e-3}"
    demo = load_config(DEMO, [earlier])
    assert reference_target(demo).config_fingerprint() == "030ecc7ea7065a8a3f146eaff0303835"
    masked = load_config(DEMO, ["train.document_masks=true"])
    assert student_target(masked, "miniplm").config_fingerprint() != "a68f5de40aeef49bcb0acf54fc572dc6"
