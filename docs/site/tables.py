"""The page of the tables: every column with its type, unit and meaning, from `miniplm_udf/schemas`.

Input: the declared tables, and `KINDS`, which says what the commands do with them. Output: a Markdown page.
"""

from docs.site.markdown import code, table
from docs.site.units import unit
from miniplm_udf import schemas
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.table_kinds import KINDS, TableKind
from miniplm_udf.schemas.types import Column, Table

_HEAD = """# Tables

Every table is a Delta table at `<root>/tables/NAME`. This page is generated from the declarations in
`miniplm_udf/schemas`. Units are in names: `_nats`, `_bytes`, `_tokens`; `n_` is a count. Timestamps are UTC
microseconds. Ids are 128-bit hashes as 32 hexadecimal digits. [Reading the tables](../reading-tables.md) shows how a
session finds them.
"""


def declared() -> dict[str, Table]:
    """Returns an example of each kind of table, by kind; names in capitals stand for names of the config."""
    named = [
        schemas.INSTANCES,
        schemas.DOCUMENT_KEYS,
        schemas.annotations(schemas.ANNOTATIONS_BY_GROUP),
        schemas.REJECTS,
        schemas.SCORES,
        schemas.score_matrix(["ALIAS"]),
        schemas.PROXY_SCORES,
        schemas.GENERATIONS,
        schemas.cuts("CORPUS"),
        schemas.refined("CORPUS", ["ALIAS"]),
        schemas.CORPORA,
        schemas.PINS,
        schemas.packed("CORPUS", "TOKENIZER"),
        schemas.TAKEDOWNS,
    ]
    return {table_names.kind_of(each.name): each for each in named}


def _type(column: Column) -> str:
    return f"{column.type}, or null" if column.nullable else column.type


def _entry(kind: TableKind, declaration: Table) -> str:
    facts = [f"Key: {', '.join(code(name) for name in declaration.key)}."]
    facts.append("Rows are only added." if declaration.append_only else "Rows are replaced or removed, too.")
    if kind.is_registered:
        facts.append("`register_tables` gives it a name for SQL.")
    if kind.remedy:
        facts.append(f"If it is lost and has no copy: {kind.remedy}.")
    rows = [(code(each.name), _type(each), unit(each.name), each.meaning) for each in declaration.columns]
    head = ("column", "type", "unit", "meaning")
    return f"## `{declaration.name}`\n\n{' '.join(facts)}\n\n{table(head, rows)}"


def page() -> str:
    """Returns the page of the tables."""
    tables = declared()
    parts = [_HEAD]
    for kind in KINDS:
        if kind.name == table_names.PINNED:
            parts.append("## `pinned/CORPUS/VERSION`\n\nThe rows of a pinned version, as in `refined/CORPUS`.\n")
        else:
            parts.append(_entry(kind, tables[kind.name]))
    return "\n".join(parts)
