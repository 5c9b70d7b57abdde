"""The pure parts of refinement: defaults of a corpus, what a selection may say, budgets, and the fingerprint."""

from typing import Any

import pytest

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig, parse_tokens
from miniplm_udf.config.rules import uniform
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.refinement.fingerprints import fingerprint_of, parts_of
from miniplm_udf.refinement.keep import budgets_of
from miniplm_udf.refinement.refine import resolve_corpus


def config(**corpora: CorpusConfig) -> ExperimentConfig:
    return ExperimentConfig(
        root="/tmp/unused",
        models={"big": ModelConfig(path="/nowhere")},
        refine=RefineConfig(tokens_of="big", corpora=corpora),
    )


def test_a_corpus_asks_for_32_tokens_unless_it_says_otherwise() -> None:
    made = config(a=CorpusConfig(score="x"), b=CorpusConfig(score="x", where="true"))
    assert resolve_corpus(made, "a").where == "big_n_tokens >= 32"
    assert resolve_corpus(made, "b").where == "true"


def test_a_random_corpus_is_scored_by_its_seed_whatever_its_score() -> None:
    def scored(seed: int) -> str | None:
        select = SelectConfig(rule="random", ratio=0.5, seed=seed)
        return resolve_corpus(config(a=CorpusConfig(score="no_such_column", select=select)), "a").score

    assert scored(3) == uniform(3)
    assert scored(3) != scored(4)


def test_an_unknown_corpus_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'b'"):
        resolve_corpus(config(a=CorpusConfig(score="x")), "b")


def test_a_fingerprint_does_not_depend_on_grouping_or_order() -> None:
    # (exclusive or, sum) of groups of the hashes 1, -2 and 3, whose low bits are 1, 2**32 - 2 and 3.
    grouped = [(1 ^ -2, 1 + 2**32 - 2), (3, 3)]
    assert fingerprint_of(grouped, 3) == fingerprint_of([(3, 3), (1, 1), (-2, 2**32 - 2)], 3)
    assert fingerprint_of(grouped, 3) != fingerprint_of([(1 ^ -2, 1 + 2**32 - 2), (5, 5)], 3)
    assert fingerprint_of([(0, 0)], 1) != fingerprint_of([(0, 0)], 2)
    added = [parts_of(fingerprint_of([(3, 3)], 1)), (1 ^ -2, 1 + 2**32 - 2)]
    assert fingerprint_of(added, 3) == fingerprint_of(grouped, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs ratio, found none"),
        ({"ratio": 1.5}, "at most 1, found 1.5"),
        ({"ratio": 0.5, "threshold": 1.0}, "needs ratio, found ratio and threshold"),
        ({"rule": "token_budget", "ratio": 0.5}, "needs budget_tokens, found ratio"),
        ({"rule": "token_budget", "budget_tokens": "many"}, "such as 300M or 50B, found 'many'"),
        ({"rule": "token_budget", "budget_tokens": 0}, "above 0"),
        ({"rule": "band", "low": 0.2}, "needs low and high, found low"),
        ({"rule": "band", "low": 0.8, "high": 0.2}, "low < high"),
        ({"rule": "random", "ratio": 0.5, "budget_tokens": 5}, "needs ratio or budget_tokens, found ratio and"),
        ({"rule": "gumbel", "ratio": 0.5}, "gumbel needs a temperature above 0, found None"),
        ({"ratio": 0.5, "temperature": 1.0}, "only the rule gumbel"),
        ({"rule": "threshold", "threshold": 0.0, "per_source": "same"}, "a threshold is the same"),
        ({"rule": "band", "low": 0.1, "high": 0.2, "per_source": {"web": 0.5}}, "cannot be divided by shares"),
        ({"ratio": 0.5, "per_source": {"web": 0.7, "code": 0.4}}, "sum to at most 1"),
        ({"ratio": 0.5, "per_source": {}}, "expected shares"),
    ],
)
def test_a_selection_that_says_too_little_or_too_much_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectConfig(**given)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [(7, 7), ("50B", 50 * 10**9), ("1.5t tokens", 15 * 10**11), ("300 M", 3 * 10**8), ("0.1k", 100), ("1_000", 1000),
     ("5x", None), ("-3", None), ("B", None)],
)  # fmt: skip
def test_tokens_are_numbers_with_decimal_units(text: int | str, tokens: int | None) -> None:
    assert parse_tokens(text) == tokens


def test_budgets_are_floors_of_what_is_written() -> None:
    totals = {"web": 100, "code": 57, "books": 3}
    assert budgets_of(SelectConfig(ratio=0.29, per_source="same"), totals) == {"web": 29, "code": 16, "books": 0}
    assert budgets_of(SelectConfig(ratio=0.5), {"": 160}) == {"": 80}
    # 80 of 160 are shared out; a source without a share is given nothing.
    shares = SelectConfig(ratio=0.5, per_source={"web": 0.6, "books": 0.4})
    assert budgets_of(shares, totals) == {"web": 48, "books": 32}
    budget = SelectConfig(rule="token_budget", budget_tokens=40, per_source="same")
    assert budgets_of(budget, totals) == {"web": 25, "code": 14, "books": 0}
    assert budgets_of(SelectConfig(rule="token_budget", budget_tokens="1k"), {"": 160}) == {"": 1000}
    assert budgets_of(SelectConfig(rule="band", low=0.1, high=0.9), {"": 10}) == {"": 9}
    assert budgets_of(SelectConfig(ratio=0.5), {}) == {}


def test_gumbel_noise_belongs_to_the_instance_and_the_seed() -> None:
    select = SelectConfig(rule="gumbel", ratio=0.5, temperature=0.25, seed=4)
    found = resolve_corpus(config(a=CorpusConfig(score="x", select=select)), "a").score
    assert found == f"(x) + 0.25D * -ln(-ln({uniform(4)}))"
