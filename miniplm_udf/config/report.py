"""The section `report` of an experiment: where the page goes, and how many texts it shows. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report.

    Attributes:
        folder: path or URI of the folder of `summary.json` and `report.html`; null takes `root`.
        examples: texts of each kind that the report shows.
    """

    folder: str | None = None
    examples: int = 5
