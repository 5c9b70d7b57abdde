"""The section `refine` of an experiment: what a corpus is ranked by, and which rows of the ranking it keeps.

Frozen dataclasses, validated where they are made, as those of config_sections.py; beside them for their size. A rule's
own text is rules.py's, the SQL is expressions.py's to check, what is kept keep.py's. Imports nothing heavy.
"""

import dataclasses
import re
from fractions import Fraction
from typing import Literal

from miniplm_udf.config_sections import check, check_name

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# What each rule needs beside its name, and what it may have: any other key would have no effect, so it is an error.
_AMOUNTS = {
    "top_ratio": ("ratio",),
    "token_budget": ("budget_tokens",),
    "random": ("ratio", "budget_tokens"),
    "gumbel": ("ratio", "budget_tokens"),
    "threshold": ("threshold",),
    "band": ("low", "high"),
}


def parse_tokens(text: int | str) -> int | None:
    """A number of tokens: 1000000, "300M", "50B", "1.5T" or "50B tokens" (decimal units); None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)(?:\s*tokens)?", str(text).strip().replace("_", "").lower())
    return None if found is None else int(Fraction(found.group(1)) * _SUFFIXES[found.group(2)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which rows of the ranking are kept.

    Attributes:
        rule: top_ratio keeps the highest floor(ratio * N); token_budget the longest prefix of at most `budget_tokens`;
            threshold score >= threshold; band what lies between the quantiles `low` and `high`; random a seeded random
            part, whatever the score; gumbel the highest of score + temperature * Gumbel noise, which is sampling
            without replacement by exp(score / temperature). The last two take a ratio or a budget.
        by: count instances or tokens; a budget counts tokens.
        budget_tokens: of the model `refine.tokens_of`, as a number or with K, M, B or T: 50B.
        low: quantile of the score, 0 being the lowest; the band reaches from it to `high`, 1 being the highest.
        temperature: of gumbel, in the score's unit.
        seed: of random and gumbel.
        per_source: null ranks all sources together; same applies the rule within each source (a budget is shared out
            by their tokens); shares by source, say {web: 0.6, code: 0.4}, say how much of the whole each is given,
            and sources without one are given nothing.
    """

    rule: Literal["top_ratio", "token_budget", "threshold", "band", "random", "gumbel"] = "top_ratio"
    ratio: float | None = None
    by: Literal["instances", "tokens"] = "instances"
    budget_tokens: int | str | None = None
    threshold: float | None = None
    low: float | None = None
    high: float | None = None
    temperature: float | None = None
    seed: int = 0
    per_source: Literal["same"] | dict[str, float] | None = None

    def __post_init__(self) -> None:
        self._check_amount()
        if self.rule == "band":
            check(
                self.low is not None and self.high is not None and 0 <= self.low < self.high <= 1,
                f"select.low, select.high: the rule band needs 0 <= low < high <= 1, found {self.low} and {self.high}",
            )
        found = self.temperature
        if self.rule == "gumbel":
            check(found is not None and found > 0, f"select.temperature: gumbel needs one above 0, found {found}")
        else:
            check(found is None, f"select.temperature: only the rule gumbel has one, found it with {self.rule}")
        self._check_shares()

    def _check_amount(self) -> None:
        known = list(_AMOUNTS[self.rule])
        names = ("ratio", "budget_tokens", "threshold", "low", "high")
        given = [name for name in names if getattr(self, name) is not None]
        is_band = self.rule == "band"
        check(
            given == known if is_band else len(given) == 1 and given[0] in known,
            f"select: the rule {self.rule} needs {(' and ' if is_band else ' or ').join(known)}, "
            f"found {' and '.join(given) or 'none of them'}",
        )
        check(
            self.ratio is None or 0 < self.ratio <= 1,
            f"select.ratio: expected a ratio above 0 and at most 1, found {self.ratio}",
        )
        check(
            self.budget_tokens is None or (parse_tokens(self.budget_tokens) or 0) > 0,
            f"select.budget_tokens: expected tokens above 0, such as 300M or 50B, found {self.budget_tokens!r}",
        )

    def _check_shares(self) -> None:
        if self.per_source is None:
            return
        check(self.rule != "threshold", "select.per_source: a threshold is the same within each source; leave it out")
        if isinstance(self.per_source, dict):
            check(
                self.rule != "band",
                "select.per_source: a band has no whole to share out; expected same, which is a band of each source",
            )
            shares = list(self.per_source.values())
            check(
                bool(shares) and all(share > 0 for share in shares) and sum(map(_exact, shares)) <= 1,
                f"select.per_source: expected shares above 0 that sum to at most 1, found {self.per_source}",
            )

    @property
    def counts_tokens(self) -> bool:
        return self.by == "tokens" or self.budget_tokens is not None


def _exact(value: float) -> Fraction:
    return Fraction(str(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One refined corpus: SQL over `score_matrix` and the instances' own columns.

    Attributes:
        candidates: the table of which rows may be kept. `proxy_scores` has the whole pool, also what no model has
            scored; expressions are over its columns then, and those of `score_matrix`, null where no model has scored.
        rule: a published rule by name (`miniplm refine --rules` lists them), in place of `score`. With neither, the
            paper's: miniplm.
        aliases: models of the experiment that stand for the rule's, where they have other names: {teacher: big}.
        score: expression to rank by, higher is better; null, of `proxy_scores`, is `prediction`.
        where: condition to be a candidate; null is at least 32 scored tokens of the model `refine.tokens_of` (of
            `proxy_scores`, as many estimated ones).
        select: null is the rule's own, and where it has none the highest half.
    """

    candidates: Literal["score_matrix", "proxy_scores"] = "score_matrix"
    rule: str | None = None
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    score: str | None = None
    where: str | None = None
    select: SelectConfig | None = None

    def __post_init__(self) -> None:
        check(
            not self.is_of_proxy or (self.rule is None and not self.aliases),
            f"rule: a rule ranks what models have scored, found {self.rule or self.aliases} with candidates: "
            "proxy_scores; leave it out, and say in proxy.score what the proxy predicts",
        )
        check(
            not self.aliases or self.rule is not None or self.score is None,
            f"aliases: expected with a rule, whose models they stand for, found with score {self.score!r}",
        )

    @property
    def is_of_proxy(self) -> bool:
        return self.candidates == "proxy_scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """`tokens_of` is the model whose tokens a selection by tokens counts."""

    tokens_of: str = "teacher"
    corpora: dict[str, CorpusConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.corpora:
            check_name("corpus", name)
            check(name != "reference", "corpus 'reference': that name is the reference split's; choose another")
