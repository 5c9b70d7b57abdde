"""The section `refine` of an experiment: what a corpus is ranked by, and which rows of the ranking it keeps.

Frozen dataclasses, checked when they are made, as in sections.py. `rules.py` reads the rules;
`refinement/expressions.py` checks the SQL, and `refinement/keep.py` applies the selection. Imports nothing heavy.
"""

import dataclasses
import re
from fractions import Fraction
from typing import Literal

from miniplm_udf.config.sections import check, check_name

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
# The keys that each rule takes: band needs both, the others exactly one. Any other key would have no effect, so it is
# an error.
_AMOUNTS = {
    "top_ratio": ("ratio",),
    "token_budget": ("budget_tokens",),
    "random": ("ratio", "budget_tokens"),
    "gumbel": ("ratio", "budget_tokens"),
    "threshold": ("threshold",),
    "band": ("low", "high"),
}


def parse_tokens(text: int | str) -> int | None:
    """Parses a number of tokens: 1000000, "300M", "50B", "1.5T" or "50B tokens" (decimal units).

    Args:
        text: the number as the config states it.

    Returns:
        The number of tokens, rounded down; None for other text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)(?:\s*tokens)?", str(text).strip().replace("_", "").lower())
    return None if match is None else int(Fraction(match.group(1)) * _SUFFIXES[match.group(2)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which rows of the ranking are kept.

    Attributes:
        rule: top_ratio keeps the highest floor(ratio * N); token_budget the longest prefix of at most `budget_tokens`;
            threshold the rows with score >= threshold; band the rows between the quantiles `low` and `high`; random a
            seeded random part, regardless of the score; gumbel the highest of score + temperature * Gumbel noise, which
            is sampling without replacement by exp(score / temperature). The last two take a ratio or a budget.
        ratio: share of the candidates to keep, above 0 and at most 1.
        by: whether the ratio counts instances or tokens; a budget always counts tokens.
        budget_tokens: tokens of the model `refine.tokens_of`, as a number or with K, M, B or T: 50B.
        threshold: lowest score that is kept.
        low: quantile of the score at which the band begins; 0 is the lowest score.
        high: quantile at which the band ends; 1 is the highest score.
        temperature: scale of gumbel's noise, in the score's unit.
        seed: seed of random and gumbel.
        per_source: null ranks all sources together; same applies the rule within each source (a budget is divided in
            proportion to the sources' tokens); shares by source, such as {web: 0.6, code: 0.4}, give each source its
            part of the whole, and other sources nothing.
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
        temperature = self.temperature
        if self.rule == "gumbel":
            check(
                temperature is not None and temperature > 0,
                f"select.temperature: gumbel needs a temperature above 0, found {temperature}",
            )
        else:
            check(
                temperature is None,
                f"select.temperature: only the rule gumbel takes a temperature, found it with {self.rule}",
            )
        self._check_shares()

    def _check_amount(self) -> None:
        needed = list(_AMOUNTS[self.rule])
        names = ("ratio", "budget_tokens", "threshold", "low", "high")
        given = [name for name in names if getattr(self, name) is not None]
        is_band = self.rule == "band"
        check(
            given == needed if is_band else len(given) == 1 and given[0] in needed,
            f"select: the rule {self.rule} needs {(' and ' if is_band else ' or ').join(needed)}, "
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
        check(self.rule != "threshold", "select.per_source: a threshold is the same for every source; remove this key")
        if isinstance(self.per_source, dict):
            check(
                self.rule != "band",
                "select.per_source: a band cannot be divided by shares; expected same: a band of each source",
            )
            shares = list(self.per_source.values())
            check(
                bool(shares) and all(share > 0 for share in shares) and sum(map(_exact, shares)) <= 1,
                f"select.per_source: expected shares above 0 that sum to at most 1, found {self.per_source}",
            )

    @property
    def counts_tokens(self) -> bool:
        """Whether the amount to keep is measured in tokens instead of instances."""
        return self.by == "tokens" or self.budget_tokens is not None


def _exact(value: float) -> Fraction:
    return Fraction(str(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One refined corpus: SQL over `score_matrix` and the instances' own columns.

    Attributes:
        candidates: the table whose rows may be kept. `proxy_scores` has the whole pool, including instances that no
            model has scored; expressions may then use its columns and the columns of `score_matrix`, which are null for
            instances without scores.
        rule: a published rule by name (`miniplm refine --rules` lists them), instead of `score`. Without either, the
            paper's rule, miniplm.
        aliases: models of the experiment that take the place of the rule's models: {teacher: big}.
        score: SQL expression to rank by; higher is better. Null with `proxy_scores` is `prediction`.
        where: SQL condition for candidates; null requires at least 32 scored tokens of the model `refine.tokens_of`
            (with `proxy_scores`, 32 estimated tokens).
        select: null takes the rule's own selection, or the highest half if it has none.
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
            "proxy_scores; remove rule and aliases, and set proxy.score to what the proxy is to predict",
        )
        check(
            not self.aliases or self.rule is not None or self.score is None,
            f"aliases: expected together with a rule, whose models they replace, found with score {self.score!r}",
        )

    @property
    def is_of_proxy(self) -> bool:
        """Whether the corpus is ranked among `proxy_scores`."""
        return self.candidates == "proxy_scores"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The refined corpora by name.

    Attributes:
        tokens_of: alias of the model whose tokens a selection by tokens counts.
        corpora: the corpora.
    """

    tokens_of: str = "teacher"
    corpora: dict[str, CorpusConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.corpora:
            check_name("corpus", name)
            check(name != "reference", "corpus 'reference': that name is the reference split's; choose another")
