"""The section `report` of an experiment: where the page goes, and how many texts it shows. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report and its `folder`, a path or URI (null: `root`), with `examples` texts of each kind."""

    folder: str | None = None
    examples: int = 5
