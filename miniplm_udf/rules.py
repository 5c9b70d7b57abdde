"""Published rules of selection by name: `rule_files/*.yaml` (from the clone also `conf/rules`), one file a rule.

    title, formula, source, models (what each stands for), score (SQL with {teacher}, {reference}), select, notes

Owns the reading of the files and the filling in of aliases; what the SQL may be is expressions.py's to check. Inputs:
a rule's name, the models that stand for its own, a seed. Output: SQL over `score_matrix`. The files are the package's,
so a wheel has them. Imports nothing heavy.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

from miniplm_udf.config_refine import CorpusConfig, SelectConfig

# Of a corpus whose config names neither a rule nor a score: the paper's; of one that a proxy ranks: its column.
DEFAULT = "miniplm"
PREDICTION = "prediction"
_HIGHEST_HALF = SelectConfig(ratio=0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule.

    Attributes:
        formula: for people.
        source: the paper and what in it.
        models: what each model of the rule is, by the name that stands for it in `score`.
        score: SQL in which `{teacher}` stands for an alias, and `{uniform}` for `uniform`.
        select: which rows are kept where the corpus does not say.
    """

    title: str
    formula: str
    source: str
    models: dict[str, str]
    score: str
    select: dict[str, Any] | None = None
    notes: str | None = None

    def sql(self, aliases: Mapping[str, str], seed: int = 0) -> str:
        """The score over these models; those without an alias have the rule's own names."""
        return self.score.format(uniform=uniform(seed), **{role: aliases.get(role, role) for role in self.models})


@functools.cache
def load_rules() -> dict[str, Rule]:
    """All rules, by name."""
    import yaml

    folder = importlib.resources.files("miniplm_udf") / "rule_files"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): Rule(**yaml.safe_load(file.read_text("utf-8"))) for file in files}


def uniform(seed: int, purpose: str = "") -> str:
    """A uniform of (0, 1) that belongs to the instance and the seed, however rows are partitioned.

    Args:
        purpose: draws for different purposes have nothing to do with each other.
    """
    of = f"instance_id, {int(seed)}L" + (f", '{purpose}'" if purpose else "")
    return f"(shiftrightunsigned(xxhash64({of}), 11) + 0.5D) / 9007199254740992D"


def in_sample(share: float) -> str:
    """Whether an instance is among those that `score.sample` scores: SQL. Those of a smaller share are among them."""
    return "true" if share >= 1 else f"{uniform(0, 'score.sample')} < {float(share)!r}D"


def resolve(corpus: CorpusConfig) -> CorpusConfig:
    """The corpus with `rule`, `score` and `select` filled in: SQL, with noise in it where the selection is random.

    A corpus that is resolved already stays as it is.
    """
    name = _name_of(corpus)
    own = load_rules()[name].select if name else None
    select = corpus.select or (SelectConfig(**own) if own else _HIGHEST_HALF)
    score = plain_score(corpus, select.seed)
    if select.rule == "random":
        score = uniform(select.seed)
    elif select.rule == "gumbel":
        assert select.temperature is not None
        noise = f" + {float(select.temperature)!r}D * -ln(-ln({uniform(select.seed)}))"
        score = score if score.endswith(noise) else f"({score}){noise}"
    return dataclasses.replace(corpus, rule=name, score=score, select=select)


def plain_score(corpus: CorpusConfig, seed: int = 0) -> str:
    """What the corpus's config says to rank by, before any noise: SQL."""
    name = _name_of(corpus)
    if corpus.score is not None or name is None:
        return corpus.score or PREDICTION
    return load_rules()[name].sql(corpus.aliases, seed)


def is_random(corpus: CorpusConfig) -> bool:
    """Whether a resolved corpus is chosen whatever its text."""
    return corpus.rule == "random" or (corpus.select is not None and corpus.select.rule == "random")


def _name_of(corpus: CorpusConfig) -> str | None:
    return corpus.rule or (DEFAULT if corpus.score is None and not corpus.is_of_proxy else None)


def describe() -> str:
    """All rules for a terminal: name, what it is, formula, SQL, source."""
    return "\n\n".join(_described(name, rule) for name, rule in load_rules().items())


def _described(name: str, rule: Rule) -> str:
    chosen = None if rule.select is None else ", ".join(f"{key}: {value}" for key, value in rule.select.items())
    lines = {
        "formula": rule.formula,
        "score": rule.score.format(uniform="(hash of instance_id and select.seed)", **{r: r for r in rule.models}),
        "select": chosen,
        **rule.models,
        "source": rule.source,
        "notes": rule.notes,
    }
    shown = [f"  {key:<10} {value}" for key, value in lines.items() if value]
    return "\n".join([f"{name}: {rule.title}", *shown])
