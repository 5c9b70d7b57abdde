"""Checks of the SQL in `refine.corpora` and `proxy.score` before a command starts. Driver only, no Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy: SQL that does not parse, columns that
no table of the experiment has. Spark checks types and everything else when it refines (refinement/expressions.py).
sqlglot parses, in the dialect of Spark. Reads nothing.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import has_commits


def expression_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the expressions that the config states itself.

    Args:
        config: the experiment.
    """
    texts: dict[str, str | None] = {"proxy.score": config.proxy.score if config.proxy else None}
    for name, corpus in config.refine.corpora.items():
        texts[f"refine.corpora.{name}.score"] = corpus.score
        texts[f"refine.corpora.{name}.where"] = corpus.where
    for key, text in texts.items():
        if text is not None:
            yield from _problems(config, key, text)


def _problems(config: ExperimentConfig, key: str, text: str) -> Iterator[str]:
    import sqlglot
    from sqlglot.errors import SqlglotError

    try:
        tree = sqlglot.parse_one(text, dialect="spark")
    except SqlglotError as error:
        yield f"{key}: {text!r} is no SQL expression{_position(error)}; correct it"
        return
    known = _columns(config)
    for name in sorted(_named(tree)):
        if name.lower() not in known:
            yield f"{key}: {text!r} names the column {name!r}, which no table has{_remedy(name, known)}"


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
