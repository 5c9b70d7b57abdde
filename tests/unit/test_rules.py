"""The shipped rules: complete, over their models, found from the clone and the package, and refused by name."""

import re
from pathlib import Path

import pytest

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.rules import describe, load_rules, resolve, uniform
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = {
    "miniplm", "miniplm_sum", "bits_per_byte", "color_filter", "rho", "perplexity_band", "scaling_filter",
    "teacher_only", "reference_only", "random",
}  # fmt: skip


def experiment(**corpora: CorpusConfig) -> ExperimentConfig:
    models = {alias: ModelConfig(path="/nowhere") for alias in ("big", "teacher", "small")}
    return ExperimentConfig(root="/tmp/unused", models=models, refine=RefineConfig(corpora=corpora))


def test_each_rule_has_its_source_and_stands_where_users_look() -> None:
    rules = load_rules()
    assert set(rules) == NAMES == {path.stem for path in (CONF / "rules").glob("*.yaml")}
    for name, rule in rules.items():
        assert set(re.findall(r"\{(\w+)\}", rule.score)) - {"uniform"} == set(rule.models), name
        # A paper by its number.
        assert re.search(r"arXiv \d{4}\.\d{5}", rule.source), name
        sql = rule.sql({role: f"my_{role}" for role in rule.models}, seed=3)
        assert all(f"my_{role}_" in sql for role in rule.models), name
        assert "{" not in sql
        resolved = resolve(CorpusConfig(rule=name))
        assert resolved.score
        assert resolved.select is not None
    shown = describe()
    assert all(f"{name}: {rule.title}" in shown and rule.source in shown for name, rule in rules.items())
    assert "{" not in shown


def test_a_corpus_without_a_rule_or_a_score_has_the_papers() -> None:
    assert resolve(CorpusConfig()).score == "reference_nll_mean - teacher_nll_mean"
    assert resolve(CorpusConfig()).select == SelectConfig(ratio=0.5)
    assert resolve(CorpusConfig(score="x")).score == "x"


def test_a_rule_brings_its_selection_and_the_corpus_may_say_otherwise() -> None:
    assert resolve(CorpusConfig(rule="perplexity_band")).select == SelectConfig(rule="band", low=0.25, high=0.75)
    own = SelectConfig(rule="threshold", threshold=3.0)
    assert resolve(CorpusConfig(rule="perplexity_band", select=own)).select == own
    # Random by rule, by selection, or both: the same.
    seeded = [
        CorpusConfig(rule="random", select=SelectConfig(ratio=0.5, seed=3)),
        CorpusConfig(score="x", select=SelectConfig(rule="random", ratio=0.5, seed=3)),
    ]
    assert [resolve(corpus).score for corpus in seeded] == [uniform(3)] * 2
    assert resolve(CorpusConfig(rule="random")).score == uniform(0)


@pytest.mark.parametrize(
    "corpus",
    [
        CorpusConfig(), CorpusConfig(score="x"), CorpusConfig(rule="perplexity_band"),
        CorpusConfig(aliases={"teacher": "big"}), CorpusConfig(select=SelectConfig(rule="random", ratio=0.5)),
        CorpusConfig(rule="teacher_only", select=SelectConfig(rule="gumbel", ratio=0.5, temperature=0.1)),
        CorpusConfig(score="x", select=SelectConfig(rule="gumbel", ratio=0.5, temperature=0.1)),
    ],
)  # fmt: skip
def test_a_resolved_corpus_resolves_to_itself(corpus: CorpusConfig) -> None:
    assert resolve(resolve(corpus)) == resolve(corpus)
    if corpus.rule == "teacher_only":
        # As out of a version's provenance.
        experiment(a=resolve(corpus))


def test_aliases_stand_for_a_rules_models() -> None:
    corpus = CorpusConfig(rule="color_filter", aliases={"teacher": "big", "reference": "small"})
    experiment(a=corpus)
    assert resolve(corpus).score == "small_nll_sum_nats - big_nll_sum_nats"


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (
            CorpusConfig(rule="colour_filter"),
            r"a\.rule: expected one of \['bits_per_byte'.*did you mean 'color_filter'",
        ),
        (CorpusConfig(rule="miniplm"), r"a\.rule: miniplm: reference: expected one of \['big', 'small', 'teacher'\]"),
        (CorpusConfig(rule="miniplm", aliases={"referense": "small"}), "did you mean 'reference'"),
        (CorpusConfig(rule="teacher_only", aliases={"teacher": "smal"}), "did you mean 'small'"),
    ],
)
def test_a_rule_that_does_not_fit_is_named_with_those_there_are(corpus: CorpusConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experiment(a=corpus)


def test_a_rule_and_a_score_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"refine\.corpora\.a: expected a rule or a score"):
        experiment(a=CorpusConfig(rule="teacher_only", score="x"))
    with pytest.raises(ConfigError, match="expected together with a rule"):
        CorpusConfig(score="x", aliases={"teacher": "big"})


def test_rules_and_selections_come_from_the_file(tmp_path: Path) -> None:
    given = [
        f"root={tmp_path}",
        "refine.corpora.difference={rule: scaling_filter, select: {rule: token_budget, budget_tokens: 50B}}",
        "refine.corpora.random={rule: perplexity_band, select: {rule: band, low: 0.1, high: 0.3, per_source: same}}",
        "refine.corpora.shares={select: {ratio: 0.5, per_source: {web: 0.6, code: 0.4}}}",
    ]
    corpora = load_config(CONF / "demo.yaml", given).refine.corpora
    assert corpora["difference"].rule == "scaling_filter"
    assert corpora["difference"].select == SelectConfig(rule="token_budget", budget_tokens="50B")
    assert corpora["random"].select == SelectConfig(rule="band", low=0.1, high=0.3, per_source="same")
    assert corpora["shares"].select == SelectConfig(ratio=0.5, per_source={"web": 0.6, "code": 0.4})
    with pytest.raises(ConfigError, match="colour"):
        load_config(CONF / "demo.yaml", [f"root={tmp_path}", "refine.corpora.x={rule: colour}"])
