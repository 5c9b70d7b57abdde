"""Scores against oracles: brute force on the plain model, a token at a time, and the official formulas in numpy."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from miniplm_udf.ingestion.chunking import Chunker
from miniplm_udf.ingestion.documents import Document
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.models import check_head
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, Row, brute_force, plain_model, plain_tokenizer, score
from tests.support.tiny_models import (
    BOS_ID,
    CHAT_TOKEN,
    SEPARATOR,
    VOCAB_SIZE,
    make_bos_folder,
    make_model,
    make_model_folder,
    make_scorer,
)

NATS_PER_TOKEN = 1e-4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def check_rows(scorer: Any, model: Any, tokenizer: Any, rows: list[Row], **oracle: Any) -> None:
    for row, found in zip(rows, score(scorer, rows), strict=True):
        expected = brute_force(model, tokenizer, row, **oracle)
        if expected.n_tokens == 0:
            assert found.reason == "no_tokens", row
            continue
        assert isinstance(found, Score), (row, found)
        assert (found.n_tokens, found.n_bytes) == (expected.n_tokens, expected.n_bytes), row
        assert found.nll_sum_nats == pytest.approx(expected.nll_sum_nats, abs=NATS_PER_TOKEN * expected.n_tokens), row


# --- brute force ---


@pytest.mark.slow
@pytest.mark.parametrize("context_prefix", ["none", "token"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_equals_brute_force(tmp_path: Path, family: str, context_prefix: str) -> None:
    folder = make_model_folder(tmp_path, family)
    scorer = make_scorer(folder, context_prefix=context_prefix)
    prefix = 0 if context_prefix == "token" else None
    check_rows(scorer, plain_model(folder), plain_tokenizer(folder), ROWS, prefix=prefix)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny_models.OTHER_FAMILIES)
def test_other_families_equal_brute_force(tmp_path: Path, family: str) -> None:
    folder = make_model_folder(tmp_path, family)
    check_rows(make_scorer(folder), plain_model(folder), plain_tokenizer(folder), ROWS[2:4])


@pytest.mark.slow
@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.OTHER_FAMILIES])
def test_bfloat16_is_near_brute_force_in_float32(tmp_path: Path, family: str) -> None:
    """Texts are off by up to 0.01 nats a token, Mamba 2 by 0.04 and Granite, whose logits are times five, by 0.06.

    A wrong position, mask or scale of the logits changes whole nats.
    """
    folder = make_model_folder(tmp_path, family)
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    for row, found in zip(ROWS[2:4], score(make_scorer(folder, dtype="bfloat16"), ROWS[2:4]), strict=True):
        expected = brute_force(model, tokenizer, row)
        assert (found.n_tokens, found.n_bytes) == (expected.n_tokens, expected.n_bytes)
        assert 0 < abs(found.nll_sum_nats - expected.nll_sum_nats) / found.n_tokens < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_own_output_layers(tmp_path: Path, tied: bool) -> None:
    folder = make_model_folder(tmp_path, "llama", tie_word_embeddings=tied)
    model = plain_model(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    check_rows(make_scorer(folder), model, plain_tokenizer(folder), ROWS[:4])


def test_a_bias_of_the_output_layer_counts(tmp_path: Path) -> None:
    """Phi starts with biases of nought: with these its parity could hold because nobody adds them."""
    folder = make_model_folder(tmp_path, "phi")
    model = plain_model(folder)
    torch.nn.init.normal_(model.lm_head.bias, std=2.0)
    model.save_pretrained(folder)
    check_rows(make_scorer(folder), model, plain_tokenizer(folder), ROWS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_equals_brute_force_on_its_weights(tmp_path: Path, quantised: bool) -> None:
    """The reference is the model that was written, its matrices through Q8_0 and back where the file is quantised."""
    import gguf

    model = make_model("llama")
    tiny_models.write_gguf(tmp_path / "tiny.gguf", model, quantised=quantised)
    if quantised:
        kind = gguf.GGMLQuantizationType.Q8_0
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2 and weight.shape[1] % 32 == 0:
                    weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))
    tiny_models.make_tokenizer().save(str(tmp_path / "plain.json"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain.json").rename(tmp_path / "plain" / "tokenizer.json")
    scorer = make_scorer(tmp_path / "tiny.gguf")
    check_rows(scorer, model, plain_tokenizer(tmp_path / "plain"), ROWS)


@pytest.mark.slow
@pytest.mark.parametrize(("context", "overlap"), [(2, 0), (2, 1), (7, 0), (7, 6), (24, 12), (128, 1)])
def test_windows_of_any_overlap(tmp_path: Path, context: int, overlap: int) -> None:
    """Positions are learned: a window that did not start at position 0, or ran over, would differ or fail."""
    folder = make_model_folder(tmp_path, "gpt2", n_positions=max(context, 8))
    scorer = make_scorer(folder, context_tokens=context, window_overlap_tokens=overlap)
    oracle = {"context": context, "overlap": overlap}
    check_rows(scorer, plain_model(folder), plain_tokenizer(folder), [*ROWS[2:4], ROWS[8]], **oracle)


@pytest.mark.slow
def test_another_separator_and_prefix(tmp_path: Path) -> None:
    """A chat-tuned teacher: its eos_token is no separator, so that one is named; so is a prefix of its own."""
    folder = make_model_folder(tmp_path, eos_token=CHAT_TOKEN)
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    check_rows(make_scorer(folder, document_separator=SEPARATOR), model, tokenizer, ROWS)
    prefixed = make_scorer(folder, document_separator=SEPARATOR, prefix_token=CHAT_TOKEN, context_prefix="token")
    check_rows(prefixed, model, tokenizer, ROWS, prefix=1)
    check_rows(make_scorer(folder, document_separator=CHAT_TOKEN), model, tokenizer, ROWS[:4], separator=1)


@pytest.mark.slow
@pytest.mark.parametrize("context_prefix", ["none", "token"])
@pytest.mark.parametrize(
    ("family", "stated_by", "bos"),
    [("gemma3_text", "add_bos_token", BOS_ID), ("llama", "post_processor", BOS_ID), ("qwen2", None, None)],
)
def test_a_bos_stands_in_front_of_every_window(
    tmp_path: Path, family: str, stated_by: str | None, bos: int | None, context_prefix: str
) -> None:
    folder = make_bos_folder(tmp_path, family, stated_by)
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    prefix = None if context_prefix == "none" else bos or 0
    check_rows(make_scorer(folder, context_prefix=context_prefix), model, tokenizer, ROWS[1:6], prefix=prefix, bos=bos)


def test_a_bos_and_a_prefix_of_the_config(tmp_path: Path) -> None:
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    model, tokenizer = plain_model(folder), plain_tokenizer(folder)
    check_rows(make_scorer(folder, bos_token="none"), model, tokenizer, ROWS[1:4])
    check_rows(make_scorer(folder, bos_token=CHAT_TOKEN), model, tokenizer, ROWS[1:4], bos=1)
    both = make_scorer(folder, context_prefix="token", prefix_token=CHAT_TOKEN)
    check_rows(both, model, tokenizer, ROWS[1:4], prefix=1, bos=BOS_ID)


def test_a_bos_changes_no_scored_token(tmp_path: Path) -> None:
    """Means of a teacher with a BOS and a reference without are over the same tokens."""
    folder = make_bos_folder(tmp_path, "llama", "post_processor")
    for mode in ("none", "token"):
        found = [score(make_scorer(folder, context_prefix=mode, bos_token=bos), ROWS) for bos in ("auto", "none")]
        for one, other in zip(*found, strict=True):
            if isinstance(one, Score):
                assert (one.n_tokens, one.n_bytes) == (other.n_tokens, other.n_bytes)
                assert one.nll_sum_nats != other.nll_sum_nats
            else:
                assert one == other


# --- what an architecture does to its logits ---


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 1.0}),
    ],
)
def test_caps_and_scales_are_not_ignored(tmp_path: Path, family: str, change: dict[str, Any]) -> None:
    """Without this, parity could hold because the cap or scale of the tiny model does nothing."""
    one = score(make_scorer(make_model_folder(tmp_path, family, name="one")), ROWS[:1])[0]
    other = score(make_scorer(make_model_folder(tmp_path, family, name="other", **change)), ROWS[:1])[0]
    assert abs(one.nll_sum_nats - other.nll_sum_nats) > 0.1


def test_a_cap_under_another_name_is_refused() -> None:
    from miniplm_udf.errors import ModelLoadError

    model = make_model("recurrent_gemma", num_attention_heads=4, num_hidden_layers=3, logits_soft_cap=2.0)
    with pytest.raises(ModelLoadError, match="cannot be scored exactly here"):
        check_head(model, VOCAB_SIZE)


# --- the official formulas, on fixed arrays ---

_WORDS = {"<sep>": 0, "a": 1, "b": 2, "c": 3, "d": 4, ".": 5, "e": 6, "f": 7}


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(_WORDS, unk_token="f"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class Bigrams(torch.nn.Module):
    """A "decoder" whose hidden state is a table's row: with it the logits of a position are those of its token."""

    def __init__(self, table_VD: np.ndarray) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding.from_pretrained(torch.from_numpy(table_VD))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self.embed(input_ids),)


class BigramLM(torch.nn.Module):
    def __init__(self, table_VD: np.ndarray, head_VD: np.ndarray) -> None:
        super().__init__()
        self.base_model = Bigrams(table_VD)
        self.head = torch.nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False)
        self.head.weight = torch.nn.Parameter(torch.from_numpy(head_VD), requires_grad=False)
        self.config = tiny_models.make_config("llama", vocab_size=len(_WORDS))
        self.dtype = torch.float32

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def official_chunks(documents: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The paper's chunks of a stream of tokens, a separator (0) behind each document; . (5) is the only mark."""
    stream = [token for document in documents for token in [*document, 0]]
    chunks = []
    while len(stream) > max_tokens:
        places = [i + 1 for i in range(max_tokens) if stream[i] in (0, 5)]
        cut = places[-1] if places else max_tokens
        chunks.append(stream[:cut])
        stream = stream[cut:]
    return [chunk for chunk in [*chunks, stream] if any(chunk)]


def official_mean(chunk: list[int], logits_VV: np.ndarray) -> tuple[float, int]:
    """Mean of -log p over the positions whose input is not the separator; targets may be one."""
    input_T, label_T = np.array(chunk[:-1]), np.array(chunk[1:])
    logits_TV = logits_VV[input_T].astype(np.float64)
    log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    loss_T = -log_p_TV[np.arange(len(label_T)), label_T]
    mask_T = (input_T != 0).astype(np.float64)
    return float((loss_T * mask_T).sum() / mask_T.sum()), int(mask_T.sum())


def test_official_arithmetic_from_documents_to_means() -> None:
    """Documents through our chunks, texts and separators; against the formulas on the flat stream of ids."""
    generator = np.random.default_rng(0)
    table_VD = generator.normal(size=(8, 4)).astype(np.float32) * 2
    head_VD = generator.normal(size=(8, 4)).astype(np.float32)
    documents = [generator.choice(range(1, 8), size=int(n)).tolist() for n in generator.integers(1, 40, size=30)]
    names = {number: word for word, number in _WORDS.items()}
    tokenizer = word_tokenizer()
    chunker = Chunker(lambda texts: [e.offsets for e in tokenizer.encode_batch(texts)], "packed", 17)
    texts = [" ".join(names[token] for token in document) for document in documents]
    fed = [chunk for i, text in enumerate(texts) for chunk in chunker.feed(Document(str(i), "s", text, "pool"))]
    chunks = [*fed, *chunker.close()]
    rows: list[Row] = [(c.text, c.segment_ends, c.slices[-1].ends) for c in chunks]
    description = ModelDescription(
        model_id="m",
        tokenizer_hash="t",
        dtype="float32",
        context_tokens=16,
        window_overlap_tokens=4,
        context_prefix="none",
        document_separator="<sep>",
        document_separator_id=0,
        prefix_token_id=None,
        vocab_size=8,
        n_parameters=1,
        weights_hash="w",
        path="p",
    )
    found = score(Scorer(BigramLM(table_VD, head_VD), tokenizer, description, tokens_per_batch=100), rows)
    expected = official_chunks(documents, 17)
    assert len(expected) > 20
    for one, chunk in itertools.zip_longest(found, expected):
        if len(chunk) == 1:
            assert one.reason == "no_tokens"
            continue
        mean, n_tokens = official_mean(chunk, table_VD @ head_VD.T)
        assert one.n_tokens == n_tokens
        assert one.nll_sum_nats / one.n_tokens == pytest.approx(mean, abs=1e-5)
