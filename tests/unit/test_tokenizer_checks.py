"""Settings of a tokenizer.json that are switched off, and texts that a tokenizer cannot tell apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.packing.tokenizers import _checked, train_bpe
from miniplm_udf.scoring import tokenizer as tokenizer_module
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash
from miniplm_udf.scoring.tokenizer_checks import is_repeatable, lost_differences, special_tokens_read
from tests.support import tiny_models
from tests.support.tiny_models import SEPARATOR

TEXT = "the quick brown fox jumps over the lazy dog, hello world"


def saved(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def ids(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_dropout_of_training_is_switched_off(tmp_path: Path) -> None:
    plain = tiny_models.make_tokenizer()
    folder = saved(tmp_path / "plain", plain)
    sampled = tiny_models.make_tokenizer()
    sampled.model.dropout = 0.3
    other = saved(tmp_path / "sampled", sampled)
    assert not is_repeatable(Tokenizer.from_file(str(other / "tokenizer.json"))), "this test could not fail"
    assert {tuple(ids(load_tokenizer(other))) for _ in range(50)} == {tuple(ids(load_tokenizer(folder)))}
    assert tokenizer_hash(other) != tokenizer_hash(folder)


def test_a_dropout_gives_another_hash_and_nothing_else_does(tmp_path: Path) -> None:
    """Scores of sampled tokens are not kept as if they were these; all other hashes are of the file's bytes."""
    import hashlib

    for text, is_marked in [
        ('{"dropout": 0.1}', True), ('{"dropout":1.0}', True), ('{"dropout": 1e-1}', True),
        ('{"dropout": null}', False), ('{"dropout": 0.0}', False), ('{"dropout":0}', False),
        ('{"dropout": 1234}', False),
    ]:  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(text)
        plain = hashlib.sha256(text.encode()).hexdigest()[:32]
        assert (tokenizer_hash(tmp_path) != plain) is is_marked, text


def test_what_samples_in_a_way_that_is_not_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = tiny_models.make_tokenizer()
    sampled.model.dropout = 0.3
    monkeypatch.setattr(tokenizer_module, "_switch_off_sampling", lambda tokenizer: None)
    with pytest.raises(ModelLoadError, match="same tokens for the same text at every call"):
        load_tokenizer(saved(tmp_path / "m", sampled))


def test_a_unigram_model_draws_no_segmentation() -> None:
    vocabulary = [("<unk>", 0.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz "), ("ab", -5.9)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, 0, False, 0.1, None))
    assert not is_repeatable(tokenizer), "this test could not fail"
    tokenizer_module._switch_off_sampling(tokenizer)
    assert is_repeatable(tokenizer)


def byte_level(change: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.post_processor = None
    tokenizer.encode_special_tokens = True
    change(tokenizer)
    return tokenizer


def normalizer(*parts: Any) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        tokenizer.normalizer = normalizers.Sequence(list(parts))

    return change


def whitespace_split(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def stripping_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("[tab]", lstrip=True, rstrip=True, normalized=False)])


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (normalizer(), []),
        # Let through: the same text in Unicode's sense, and a space in front of the whole.
        (normalizer(normalizers.NFC()), []),
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), []),
        (normalizer(normalizers.Lowercase()), ["letter case"]),
        (normalizer(normalizers.NFD(), normalizers.StripAccents()), ["accents"]),
        (normalizer(normalizers.NFKC()), ["compatibility forms", "punctuation marks", "invisible characters"]),
        (normalizer(normalizers.Strip()), ["spaces", "line breaks"]),
        (normalizer(normalizers.Replace("``", '"')), ["punctuation marks"]),
        (normalizer(normalizers.Replace("\n", " ")), ["line breaks"]),
        (whitespace_split, ["spaces", "line breaks", "invisible characters"]),
        (stripping_token, ["spaces around [tab]"]),
    ],
)
def test_what_a_tokenizer_loses(change: Callable[[Tokenizer], None], lost: list[str]) -> None:
    assert lost_differences(byte_level(change)) == lost


def test_unknown_characters_and_words() -> None:
    word_level = Tokenizer(models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    assert "rare characters" in lost_differences(word_level)
    # Without an unk_token, BPE leaves an unknown character out in silence.
    assert "rare characters" in lost_differences(Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    pieces = {"?": 0, "x": 1, "##x": 2}
    word_piece = Tokenizer(models.WordPiece(pieces, unk_token="?", max_input_chars_per_word=100))
    assert "long words" in lost_differences(word_piece)


def test_texts_that_spell_a_special_token() -> None:
    assert special_tokens_read(byte_level(normalizer())) == []
    tokenizer = Tokenizer(models.Unigram([("<unk>", -20.0), ("</s>", 0.0), ("a", -1.0)], 0, False))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    assert special_tokens_read(tokenizer) == ["</s>"]


def lossy_folder(tmp_path: Path) -> Path:
    folder = tiny_models.make_model_folder(tmp_path)
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    return saved(folder, tokenizer)


def test_a_lossy_tokenizer_is_warned_about_and_scores_no_bytes(tmp_path: Path) -> None:
    config = ModelConfig(path=str(lossy_folder(tmp_path)), context_tokens=64, window_overlap_tokens=8)
    [warning] = describe("m", config).warnings
    assert warning.startswith("m: its tokenizer drops or merges letter case")
    with pytest.raises(ConfigError, match=r"models\.m\.context_prefix: token scores every byte.*letter case"):
        describe(
            "m", ModelConfig(path=str(config.path), context_tokens=64, window_overlap_tokens=8, context_prefix="token")
        )


def test_nothing_is_trained_on_a_lossy_tokenizer(tmp_path: Path) -> None:
    content = (lossy_folder(tmp_path) / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match=r"tokenizers\.t: expected a tokenizer that keeps all of a text.*letter case"):
        _checked("t", "tokenizers.t", content, SEPARATOR)
    with pytest.raises(ModelLoadError, match="refuses"):
        _checked("t", "tokenizers.t", b"{}", SEPARATOR)
    assert _checked("t", "tokenizers.t", train_bpe(iter([TEXT]), 300, SEPARATOR), SEPARATOR).document_separator_id == 0
