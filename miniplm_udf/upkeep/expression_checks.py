"""Checks of the SQL in `refine.corpora` and `proxy.score` before a command starts. Driver only, no Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy: SQL that does not parse, columns that
no table of the experiment has, functions that Spark does not have, a `where` that is a number or a text. Spark checks
all other types when it refines (refinement/expressions.py). sqlglot parses, in the dialect of Spark. Reads nothing.
"""

import difflib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.keys import same_for
from miniplm_udf.config.rules import plain_score
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits
from miniplm_udf.upkeep.model_checks import has_no_prefix

_SHOWN_CHARACTERS = 100
# Functions of Spark's SQL that neither sqlglot nor `pyspark.sql.functions` names.
_SQL_FUNCTIONS = frozenset({"bigint", "binary", "smallint", "tinyint", "luhn_check", "measure"})


def expression_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the expressions that the config states itself.

    Args:
        config: the experiment.
    """
    # Expressions that are alike have one problem, with all their keys.
    keys: dict[tuple[str, str | None], list[str]] = {}
    if config.proxy is not None:
        keys["score", config.proxy.score] = ["proxy.score"]
    for name, corpus in config.refine.corpora.items():
        texts = {"score": corpus.score, "where": corpus.where}
        if corpus.score is None:
            texts["rule"] = plain_score(corpus)
        for kind, text in texts.items():
            keys.setdefault((kind, text), []).append(f"refine.corpora.{name}.{kind}")
    for (kind, text), alike in keys.items():
        if text is not None:
            find = _null_columns if kind == "rule" else _problems
            for problem in find(config, alike[0], text):
                yield problem + same_for(alike[1:])


def _problems(config: ExperimentConfig, key: str, text: str) -> Iterator[str]:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        tree = sqlglot.parse_one(text, dialect="spark")
    except SqlglotError as error:
        yield f"{key}: {_shown(text)} is no SQL expression{_position(error)}; correct it"
        return
    known = _columns(config)
    by_remedy: dict[str, list[str]] = {}
    for name in sorted(_named(tree)):
        if name.lower() not in known:
            by_remedy.setdefault(_remedy(name, known), []).append(repr(name))
    for remedy, names in by_remedy.items():
        columns = f"the column{'s' * (len(names) > 1)} {', '.join(names)}"
        yield f"{key}: {_shown(text)} names {columns}, which no table has{remedy}"
    yield from _null_columns(config, key, text)
    if "spark.sql.extensions" not in config.spark.conf:
        yield from _unknown_functions(key, tree)
    if key.endswith(".where") and (kind := _no_condition(tree)) is not None:
        yield f"{key}: expected a condition, found {_shown(text)}, which is {kind}; compare it with a value"


def _null_columns(config: ExperimentConfig, key: str, text: str) -> Iterator[str]:
    """Yields the models whose bits per byte are null, because they do not score the first token of a text."""
    for alias in config.scored_aliases:
        if re.search(rf"\b{alias}_bits_per_byte\b", text) and has_no_prefix(config, alias):
            yield (
                f"{key}: {alias}_bits_per_byte is null for every text, because nothing stands in front of the first "
                f"token, so that {alias} does not score it; set models.{alias}.context_prefix=token"
            )


def _unknown_functions(key: str, tree: Any) -> Iterator[str]:
    """Functions that Spark does not have; none where pyspark is not installed."""
    from sqlglot import exp

    # sqlglot has a class for each function that it knows.
    others = {part.name.lower() for part in tree.find_all(exp.Anonymous) if part.name} - _SQL_FUNCTIONS
    others = {name for name in others if not name.startswith("vector_")}
    if not others or find_spec("pyspark") is None:
        return
    from pyspark.sql import functions

    known = {name.lower() for name in dir(functions) if not name.startswith("_")}
    for name in sorted(others - known):
        close = difflib.get_close_matches(name, sorted(known), n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "use a function of Spark's SQL"
        yield f"{key}: names the function {name!r}, which Spark does not have; {remedy}"


def _no_condition(tree: Any) -> str | None:
    """Returns what an expression is if it is certainly no condition, in words; else None."""
    from sqlglot import exp

    tree = tree.unnest()
    if isinstance(tree, exp.Add | exp.Sub | exp.Mul | exp.Div | exp.Mod | exp.Neg):
        return "a number"
    if isinstance(tree, exp.Literal):
        return "a text" if tree.is_string else "a number"
    return None


def _shown(text: str) -> str:
    """The expression in quotes; a long one is not repeated for each of its problems."""
    return repr(text) if len(text) <= _SHOWN_CHARACTERS else "the expression"


def _position(error: Any) -> str:
    details: Json = next(iter(getattr(error, "errors", ())), {})
    if "line" not in details:
        return f" ({str(error).splitlines()[0]})"
    what = str(details["description"]).rstrip(".")
    if " missing for <" in what:  # the text then names a class of sqlglot
        what = "an operand is missing"
    return f" (at character {details['col']} of line {details['line']}: {what})"


def _named(tree: Any) -> set[str]:
    """The columns of an expression, without the parameters of its lambda functions."""
    from sqlglot import exp

    parameters = {name.name.lower() for part in tree.find_all(exp.Lambda) for name in part.expressions}
    # In `a.b`, sqlglot takes `a` for a table; to Spark it may be a struct.
    columns = {column.parts[0].name for column in tree.find_all(exp.Column)}
    return {name for name in columns if name and name.lower() not in parameters}


def _columns(config: ExperimentConfig) -> set[str]:
    """The names that an expression may have, in lower case."""
    # An earlier config may have made annotations.
    is_annotated = has_commits(config.layout.table(schemas.ANNOTATIONS))
    groups = list(schemas.ANNOTATIONS_BY_GROUP) if is_annotated else config.annotate.groups if config.annotate else []
    tables = [schemas.score_matrix(config.scored_aliases), schemas.INSTANCES, schemas.annotations(groups)]
    if config.proxy is not None:
        tables.append(schemas.PROXY_SCORES)
    return {name.lower() for table in tables for name in table.column_names}


def _remedy(name: str, known: set[str]) -> str:
    for group, columns in schemas.ANNOTATIONS_BY_GROUP.items():
        if name.lower() in {column.name for column in columns}:
            return f"; set annotate.{group}, which makes it"
    close = difflib.get_close_matches(name.lower(), sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; columns are {', '.join(sorted(known))}"
