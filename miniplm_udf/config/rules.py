"""Published selection rules by name: `rule_files/*.yaml` (in a clone also `conf/rules`), one file per rule.

    title, formula, source, models (what each one is), score (SQL with {teacher}, {reference}), select, notes

Reads the files and fills in model aliases. Input: a rule's name, the models that take the place of its own, a seed.
Output: SQL over `score_matrix`, which `refinement/expressions.py` checks. The files are part of the package, so a wheel
has them. Imports nothing heavy.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping

from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.storage import Json

# The rule of a corpus whose config has neither a rule nor a score, and the score of a corpus that a proxy ranks.
DEFAULT = "miniplm"
PREDICTION = "prediction"
_HIGHEST_HALF = SelectConfig(ratio=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule.

    Attributes:
        title: one line about the rule.
        formula: the formula, for people to read.
        source: the paper, and the place in it.
        models: what each model of the rule is, by its name in `score`.
        score: SQL; `{teacher}` is replaced by a model alias, `{uniform}` by the SQL of `uniform`.
        select: which rows are kept if the corpus has no `select`.
        notes: remarks for people.
    """

    title: str
    formula: str
    source: str
    models: dict[str, str]
    score: str
    select: Json | None = None
    notes: str | None = None

    def sql(self, aliases: Mapping[str, str], seed: int = 0) -> str:
        """The score as SQL.

        Args:
            aliases: model aliases by the rule's names; a missing name is itself the alias.
            seed: seed of `{uniform}`.
        """
        return self.score.format(uniform=uniform(seed), **{role: aliases.get(role, role) for role in self.models})


@functools.cache
def load_rules() -> dict[str, Rule]:
    """All rules by name, read once in a process."""
    import yaml

    folder = importlib.resources.files("miniplm_udf.config") / "rule_files"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): Rule(**yaml.safe_load(file.read_text("utf-8"))) for file in files}


def uniform(seed: int, purpose: str = "") -> str:
    """Returns SQL for a uniform number in (0, 1) that depends on the instance and the seed, not on partitions.

    Args:
        seed: draws with different seeds are independent.
        purpose: draws for different purposes are independent too.
    """
    arguments = f"instance_id, {int(seed)}L" + (f", '{purpose}'" if purpose else "")
    return f"(shiftrightunsigned(xxhash64({arguments}), 11) + 0.5D) / 9007199254740992D"


def in_sample(share: float) -> str:
    """Returns an SQL condition: whether an instance is in the share that `score.sample` scores.

    Args:
        share: share of the instances, from 0 to 1. A larger share contains a smaller share.
    """
    return "true" if share >= 1 else f"{uniform(0, 'score.sample')} < {float(share)!r}D"


def resolve(corpus: CorpusConfig) -> CorpusConfig:
    """Returns a corpus with `rule`, `score` (SQL, with noise if the selection is random) and `select` filled in.

    A resolved corpus stays unchanged.

    Args:
        corpus: a section of `refine.corpora`.
    """
    name = _name_of(corpus)
    rule_select = load_rules()[name].select if name else None
    select = corpus.select or (SelectConfig(**rule_select) if rule_select else _HIGHEST_HALF)
    score = plain_score(corpus, select.seed)
    if select.rule == "random":
        score = uniform(select.seed)
    elif select.rule == "gumbel":
        assert select.temperature is not None
        noise = f" + {float(select.temperature)!r}D * -ln(-ln({uniform(select.seed)}))"
        score = score if score.endswith(noise) else f"({score}){noise}"
    return dataclasses.replace(corpus, rule=name, score=score, select=select)


def plain_score(corpus: CorpusConfig, seed: int = 0) -> str:
    """Returns the SQL of the score that the corpus's config ranks by, without noise.

    Args:
        corpus: a section of `refine.corpora`.
        seed: seed of a rule that draws random numbers.
    """
    name = _name_of(corpus)
    if corpus.score is not None or name is None:
        return corpus.score or PREDICTION
    return load_rules()[name].sql(corpus.aliases, seed)


def is_random(corpus: CorpusConfig) -> bool:
    """Whether a resolved corpus is selected at random, regardless of its text.

    Args:
        corpus: the result of `resolve`.
    """
    return corpus.rule == "random" or (corpus.select is not None and corpus.select.rule == "random")


def is_random_corpus(corpora: Mapping[str, CorpusConfig], name: str) -> bool:
    """Whether a corpus that a student names is selected at random; generated texts are not.

    Args:
        corpora: the section `refine.corpora`.
        name: name of the corpus.
    """
    return name in corpora and is_random(resolve(corpora[name]))


def is_baseline_corpus(corpora: Mapping[str, CorpusConfig], name: str) -> bool:
    """Whether a corpus that a student names keeps a random part of the candidates, or all of them.

    Args:
        corpora: the section `refine.corpora`.
        name: name of the corpus.
    """
    if name not in corpora:
        return False
    corpus = resolve(corpora[name])
    return is_random(corpus) or (corpus.select is not None and corpus.select.ratio == 1)


def _name_of(corpus: CorpusConfig) -> str | None:
    return corpus.rule or (DEFAULT if corpus.score is None and not corpus.is_of_proxy else None)


def describe() -> str:
    """All rules as text for a terminal: name, title, formula, SQL, source."""
    return "\n\n".join(_described(name, rule) for name, rule in load_rules().items())


def _described(name: str, rule: Rule) -> str:
    selection = None if rule.select is None else ", ".join(f"{key}: {value}" for key, value in rule.select.items())
    lines = {
        "formula": rule.formula,
        "score": rule.score.format(uniform="(hash of instance_id and select.seed)", **{r: r for r in rule.models}),
        "select": selection,
        **rule.models,
        "source": rule.source,
        "notes": rule.notes,
    }
    shown = [f"  {key:<10} {value}" for key, value in lines.items() if value]
    return "\n".join([f"{name}: {rule.title}", *shown])
