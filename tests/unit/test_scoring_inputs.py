"""The input of the model: the two arithmetics on fixed ids, byte counts, pieces, and text that cannot be encoded."""

import dataclasses
from typing import Literal

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from miniplm_udf.scoring import inputs
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.inputs import EncodedText, TextEncoder, TextTokenizer, pieces, segments
from miniplm_udf.scoring.results import Failure
from tests.support import tiny_models

WORDS = {"<sep>": 0, "a": 1, "bb": 2, "ä": 3, "c": 4, "<pre>": 5, "?": 6}


def describe(context_prefix: Literal["none", "token"] = "none", vocab_size: int = 7) -> ModelDescription:
    return ModelDescription(
        model_id="m",
        tokenizer_hash="t",
        dtype="float32",
        context_tokens=64,
        window_overlap_tokens=16,
        context_prefix=context_prefix,
        document_separator="<sep>",
        document_separator_id=0,
        prefix_token_id=5 if context_prefix == "token" else None,
        vocab_size=vocab_size,
        n_parameters=1,
        weights_hash="w",
        path="p",
    )


def word_tokenizer() -> Tokenizer:
    """Splits at spaces, which no token covers."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def encode_with(
    tokenizer: Tokenizer, description: ModelDescription, text: str | None, ends: list[int], ends_document: bool
) -> EncodedText | Failure:
    shared = TextTokenizer(tokenizer)
    [tokenized] = shared.tokenize([text], [ends])
    return TextEncoder(shared, description).encode(tokenized, ends_document)


def encode(text: str, ends: list[int], ends_document: bool, prefix: Literal["none", "token"] = "none") -> EncodedText:
    found = encode_with(word_tokenizer(), describe(prefix), text, ends, ends_document)
    assert isinstance(found, EncodedText), found
    return found


def test_official_arithmetic_golden() -> None:
    found = encode("a bb ä c", [5], True)
    assert found.ids.tolist() == [1, 2, 0, 3, 4, 0]
    # Input:                     a  bb  sep  ä  c      a separator's own prediction counts, the one behind it does not
    assert found.scored.tolist() == [True, True, False, True, True]
    assert found.n_bytes == len("a bb ä c".encode()) - len(b"a") - len("ä".encode())


def test_official_without_a_document_end_has_no_last_separator() -> None:
    found = encode("a bb", [], False)
    assert found.ids.tolist() == [1, 2]
    assert found.scored.tolist() == [True]
    assert found.n_bytes == 3


def test_official_masks_by_the_id_of_the_input_also_inside_text() -> None:
    found = encode("a <sep> bb c", [], False)
    assert found.ids.tolist() == [1, 0, 2, 4]
    assert found.scored.tolist() == [True, False, True]
    assert found.n_bytes == len("a <sep> bb c") - len("a") - len("bb")


def test_prefix_arithmetic_golden() -> None:
    found = encode("a bb ä c", [5], True, "token")
    assert found.ids.tolist() == [5, 1, 2, 0, 3, 4]
    # Target:                      a     bb    sep    ä     c
    assert found.scored.tolist() == [True, True, False, True, True]
    assert found.n_bytes == len("a bb ä c".encode())


def test_empty_segments_and_offsets_at_both_ends() -> None:
    assert encode("a bb", [0], False).ids.tolist() == [0, 1, 2]
    assert encode("a bb", [0], False).scored.tolist() == [False, True]
    assert encode("a bb", [4], False).ids.tolist() == [1, 2, 0]
    assert encode("a bb", [0], False, "token").scored.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("text", "ends", "ends_document", "reason"),
    [
        ("", [], False, "no_tokens"),
        ("", [], True, "no_tokens"),
        ("a", [], False, "no_tokens"),
        (None, [], False, "tokenizer_failed"),
        ("a \ud800", [], False, "tokenizer_failed"),
        ("a bb", [5], False, "tokenizer_failed"),
        ("a bb", [3, 2], False, "tokenizer_failed"),
        ("ä a", [1], False, "tokenizer_failed"),
    ],
)
def test_failures(text: str | None, ends: list[int], ends_document: bool, reason: str) -> None:
    found = encode_with(word_tokenizer(), describe(), text, ends, ends_document)
    assert isinstance(found, Failure)
    assert found.reason == reason


def test_one_token_is_scored_where_something_stands_around_it() -> None:
    assert encode("a", [], True).scored.tolist() == [True]
    assert encode("a", [], False, "token").n_bytes == 1


def test_ids_outside_the_model_are_a_failure() -> None:
    found = encode_with(word_tokenizer(), describe(vocab_size=4), "a c", [], False)
    assert isinstance(found, Failure)
    assert found.reason == "tokenizer_failed"


def test_bytes_of_a_character_cut_by_tokens() -> None:
    """The first token holds one of the smiley's four bytes: the whole character counts as not scored."""
    description = dataclasses.replace(describe(vocab_size=tiny_models.VOCAB_SIZE), model_revision="")
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.post_processor = None
    found = encode_with(tokenizer, description, "😀ab", [], False)
    assert isinstance(found, EncodedText)
    assert len(found.ids) == 6
    assert found.n_bytes == 2


def test_segments() -> None:
    assert segments("aäb", [1, 3]) == ["a", "ä", "b"]
    assert segments("aäb", []) == ["aäb"]
    with pytest.raises(UnicodeDecodeError):
        segments("aäb", [2])


@pytest.mark.parametrize(
    "text", ["", "abc", "ab cd ef gh", "abcdefghijkl", "ab      cdefgh", "      a", "a b\n\n c  d e  f"]
)
def test_pieces_join_to_the_text(text: str) -> None:
    for limit in range(1, 14):
        found = list(pieces(text, limit))
        assert "".join(found) == text
        assert all(0 < len(piece) <= limit for piece in found)


def test_pieces_are_cut_before_a_space_that_follows_a_word() -> None:
    assert list(pieces("ab cd ef", 4)) == ["ab", " cd", " ef"]
    assert list(pieces("ab   cdef", 5)) == ["ab", "   cd", "ef"]


def test_long_text_has_the_same_ids_as_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the quick  brown fox, é😀 jumps\n\n over 12 " * 50
    tokenizer = tiny_models.make_tokenizer()
    description = describe(vocab_size=tiny_models.VOCAB_SIZE)
    whole = encode_with(tokenizer, description, text, [], False)
    monkeypatch.setattr(inputs.pieces, "__defaults__", (64,))
    monkeypatch.setattr(inputs, "_CALL_CHARACTERS", 100)
    cut = encode_with(tokenizer, description, text, [], False)
    assert isinstance(whole, EncodedText)
    assert isinstance(cut, EncodedText)
    assert cut.ids.tolist() == whole.ids.tolist()
    assert cut.n_bytes == whole.n_bytes


def test_texts_of_one_call_do_not_meet() -> None:
    """Texts of several segments and pieces, tokenized by one call: each as if alone, failures at their rows."""
    texts = ["a bb", None, "", "ä \ud800", "c " * 40, "bb ä"]
    ends: list[list[int]] = [[1], [], [], [], [20, 20], [9]]
    found = TextTokenizer(word_tokenizer()).tokenize(texts, ends)
    alone = [TextTokenizer(word_tokenizer()).tokenize([text], [end])[0] for text, end in zip(texts, ends, strict=True)]
    assert [isinstance(one, Failure) for one in found] == [False, True, False, True, False, True]
    encoder = TextEncoder(TextTokenizer(word_tokenizer()), describe("token"))
    for one, other in zip(found, alone, strict=True):
        first, second = encoder.encode(one, True), encoder.encode(other, True)
        assert type(first) is type(second)
        if isinstance(first, EncodedText) and isinstance(second, EncodedText):
            assert first.ids.tolist() == second.ids.tolist()
            assert first.n_bytes == second.n_bytes


def test_a_character_of_many_tokens_at_the_border_of_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are cut between characters: every byte of a text without a space is still covered."""
    monkeypatch.setattr(inputs.pieces, "__defaults__", (3,))
    text = "😀终é" * 5
    description = dataclasses.replace(
        describe("token", tiny_models.VOCAB_SIZE), prefix_token_id=1, document_separator_id=1, model_revision=""
    )
    found = encode_with(tiny_models.make_tokenizer(), description, text, [4], False)
    assert isinstance(found, EncodedText)
    assert found.n_bytes == len(text.encode())
    assert int(found.scored.sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "ends", "n_tokens", "n_bytes"),
    [("hello", [], 5, 4), ("é😀 x", [], 9, 6), ("é", [], 3, 0), ("😀a", [4], 7, 0), (" a", [], 3, 1)],
)
def test_a_tokenizer_of_sentencepiece(text: str, ends: list[int], n_tokens: int, n_bytes: int) -> None:
    """A tokenizer that adds a space in front and falls back to bytes: the first token may cover no byte of the text."""
    words = ["<s>", *(f"<0x{number:02X}>" for number in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁h"]
    bpe = models.BPE({word: number for number, word in enumerate(words)}, [("▁", "h")], byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    official = encode_with(tokenizer, describe(vocab_size=len(words)), text, ends, False)
    assert isinstance(official, EncodedText)
    assert (int((official.ids != 0).sum()), official.n_bytes) == (n_tokens, n_bytes)
    prefixed = encode_with(tokenizer, describe("token", len(words)), text, ends, False)
    assert isinstance(prefixed, EncodedText)
    assert (int(prefixed.scored.sum()), prefixed.n_bytes) == (n_tokens, len(text.encode()))
