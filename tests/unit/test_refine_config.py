"""The pure parts of refinement: defaults of a corpus, and its fingerprint."""

import pytest

from miniplm_udf.config import CorpusConfig, ExperimentConfig, ModelConfig, RefineConfig, SelectConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.refine import fingerprint_of, parts_of, random_score, resolve


def config(**corpora: CorpusConfig) -> ExperimentConfig:
    return ExperimentConfig(
        root="/tmp/unused",
        models={"big": ModelConfig(path="/nowhere")},
        refine=RefineConfig(tokens_of="big", corpora=corpora),
    )


def test_a_corpus_asks_for_32_tokens_unless_it_says_otherwise() -> None:
    made = config(a=CorpusConfig(score="x"), b=CorpusConfig(score="x", where="true"))
    assert resolve(made, "a").where == "big_n_tokens >= 32"
    assert resolve(made, "b").where == "true"


def test_a_random_corpus_is_scored_by_its_seed_whatever_its_score() -> None:
    def scored(seed: int) -> str:
        select = SelectConfig(rule="random", ratio=0.5, seed=seed)
        return resolve(config(a=CorpusConfig(score="no_such_column", select=select)), "a").score

    assert scored(3) == random_score(3)
    assert scored(3) != scored(4)


def test_an_unknown_corpus_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'b'"):
        resolve(config(a=CorpusConfig(score="x")), "b")


def test_a_fingerprint_does_not_depend_on_grouping_or_order() -> None:
    # (exclusive or, sum) of groups of the hashes 1, -2 and 3, whose low bits are 1, 2**32 - 2 and 3.
    grouped = [(1 ^ -2, 1 + 2**32 - 2), (3, 3)]
    assert fingerprint_of(grouped, 3) == fingerprint_of([(3, 3), (1, 1), (-2, 2**32 - 2)], 3)
    assert fingerprint_of(grouped, 3) != fingerprint_of([(1 ^ -2, 1 + 2**32 - 2), (5, 5)], 3)
    assert fingerprint_of([(0, 0)], 1) != fingerprint_of([(0, 0)], 2)
    added = [parts_of(fingerprint_of([(3, 3)], 1)), (1 ^ -2, 1 + 2**32 - 2)]
    assert fingerprint_of(added, 3) == fingerprint_of(grouped, 3)
