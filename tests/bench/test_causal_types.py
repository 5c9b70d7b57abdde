"""Every causal `model_type` of transformers: a text's score alone, with longer texts, and by plain transformers.

A type is covered (one number, the right one), refused when it is loaded (ModelLoadError or ConfigError with a reason),
or cannot be built tiny (skipped, with the reason). The last test prints the table and counts. Long: `make test-long`.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scoring.results import Score
from tests.support.causal_types import tiny_config
from tests.support.scoring_oracles import Row, plain_model, plain_tokenizer, score
from tests.support.tiny_models import make_scorer, make_tokenizer

pytestmark = pytest.mark.long

# Tokens of the texts, from below to above the reach of the tiny models' windows; a merge joins none of the letters.
LENGTHS = (5, 23, 41)
# Tolerances: a score alone and with others; our score and that of plain transformers, which adds in another order.
NATS_A_TOKEN, NATS_A_TOKEN_PLAIN = 1e-5, 1e-4
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# With transformers 5.23; of the others the head or the batch is refused, or the rules fail.
N_COVERED = 147
COVERED: list[str] = []
REFUSED: dict[str, str] = {}
NOT_BUILT: dict[str, str] = {}


def made_folder(parent: Path, model_type: str) -> Path:
    """The folder of a tiny model with random weights, or a skip with the reason."""
    torch.manual_seed(0)
    try:
        config = tiny_config(model_type)
        model: Any = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Larger than transformers makes them: what a text says shows in whole nats.
                if parameter.ndim == 2 and "A_log" not in name:
                    parameter.mul_(3.0)
        model.eval()(input_ids=torch.arange(1, 42)[None], use_cache=False)
        model.save_pretrained(parent / "model")
    except Exception as error:  # whatever it is, it is not ours: a config that the rules cannot shrink
        NOT_BUILT[model_type] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        pytest.skip(f"cannot be built tiny: {NOT_BUILT[model_type]}")
    make_tokenizer().save(str(parent / "model" / "tokenizer.json"))
    return parent / "model"


@torch.inference_mode()
def plain_nll(folder: Path, row: Row) -> float:
    """The text's one window through plain transformers, alone."""
    ids = torch.tensor([[0, *plain_tokenizer(folder)(row[0], add_special_tokens=False).input_ids]])
    logits = plain_model(folder)(input_ids=ids[:, :-1], use_cache=False).logits[0].double()
    return -float(torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None]).sum())


def check_scores(folder: Path, scorer: Any) -> None:
    rows: list[Row] = [(("qzjvxkq" * 6)[:length], [], False) for length in LENGTHS]
    alone = [score(scorer, [row])[0] for row in rows]
    together = score(scorer, rows)
    again = [score(scorer, [row])[0] for row in rows[::-1]][::-1]
    for row, length, one, *others in zip(rows, LENGTHS, alone, together, again, strict=True):
        assert isinstance(one, Score), one
        assert one.n_tokens == length
        for other in others:
            assert other.nll_sum_nats == pytest.approx(one.nll_sum_nats, abs=NATS_A_TOKEN * length)
        assert one.nll_sum_nats == pytest.approx(plain_nll(folder, row), abs=NATS_A_TOKEN_PLAIN * length)


@pytest.mark.parametrize("model_type", TYPES)
def test_scores_do_not_depend_on_the_batch(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = made_folder(tmp_path, model_type)
        try:
            scorer = make_scorer(
                folder, 1000, context_tokens=64, context_prefix="token", document_separator="<|endoftext|>"
            )
        except (ModelLoadError, ConfigError) as error:
            REFUSED[model_type] = str(error)
            return
        check_scores(folder, scorer)
        COVERED.append(model_type)
    finally:
        torch.set_num_threads(threads)


def test_as_many_types_as_before_are_covered(capsys: pytest.CaptureFixture[str]) -> None:
    """Their number cannot fall unseen: where rules or transformers change, so does this test."""
    if len(COVERED) + len(REFUSED) + len(NOT_BUILT) < len(TYPES):
        pytest.skip("needs the tests of all types in this run")
    with capsys.disabled():
        print(f"\ncovered ({len(COVERED)}): {' '.join(COVERED)}")
        for what, types in (("refused", REFUSED), ("cannot be built tiny", NOT_BUILT)):
            print(f"{what} ({len(types)}):", *(f"  {name}: {reason}" for name, reason in types.items()), sep="\n")
    assert len(COVERED) >= N_COVERED
