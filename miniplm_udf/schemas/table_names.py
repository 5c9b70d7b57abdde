"""The names of tables that stand in folders: one for each corpus, version or tokenizer.

    refined/<corpus>, cuts/<corpus>, pinned/<corpus>/<version>, packed/<corpus>/<tokenizer>

A table's name is its place below `<root>/tables` (`layout.Root.table` makes its URI). Its kind is the first part:
`refined`, or for a table without a folder its whole name, `scores`. No other module builds these names or takes them
apart. Pure; imports nothing.
"""

REFINED = "refined"
CUTS = "cuts"
PINNED = "pinned"
PACKED = "packed"
FOLDERS = (REFINED, CUTS, PINNED, PACKED)


def refined(corpus: str) -> str:
    """Name of the table of the corpus `corpus`."""
    return f"{REFINED}/{corpus}"


def cuts(corpus: str) -> str:
    """Name of the table with the counts of the followed corpus `corpus`."""
    return f"{CUTS}/{corpus}"


def pinned(corpus: str, version: int) -> str:
    """Name of the copy of version `version` of the corpus `corpus`."""
    return f"{PINNED}/{corpus}/{version}"


def packed(corpus: str, tokenizer: str) -> str:
    """Name of the token sequences of the corpus `corpus` for the tokenizer `tokenizer`."""
    return f"{PACKED}/{corpus}/{tokenizer}"


def kind_of(table: str) -> str:
    """The kind of the table `table`: `refined` for `refined/best`, `scores` for `scores`."""
    return table.split("/")[0]


def corpus_of(table: str) -> str | None:
    """Name of the corpus that the table `table` belongs to; None for a table without a folder."""
    _, *parts = table.split("/")
    return parts[0] if parts else None
