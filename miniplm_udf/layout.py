"""Where everything lies under the root of an experiment. No other module builds these paths.

    <root>/tables/<table>                     one Delta table per name in `schemas`
    <root>/tables/instances.json              how the instances were cut and split
    <root>/tables/refined/<corpus>            versions of a corpus;  cuts/<corpus>: the running cut of a followed corpus
    <root>/tables/pinned/<corpus>/<version>   copy of a pinned version
    <root>/tables/packed/<corpus>/<tokenizer> token sequences
    <root>/_checkpoints/<query>               checkpoint of a streaming query;  <query>.json: facts about the query
    <root>/models/<name>                      model folders: reference, students, tokenizers;  <alias>.json: records
    <root>/proxy/...                          the proxy's record, model and report
    <root>/exports/<name>                     exports for which the user named no other folder
    <root>/_leases, _status, _stages          which driver runs, how far its queries are, the record of each stage

Input: the URI of a root; output: URIs. Reads and writes no file. Imports no Spark and no torch.
"""

import dataclasses

from miniplm_udf import storage


def query_facts(checkpoint_uri: str) -> str:
    """Returns the URI of the facts about a query: a file next to its checkpoint folder, which belongs to Spark.

    Args:
        checkpoint_uri: the checkpoint folder, with or without a trailing slash.
    """
    return f"{checkpoint_uri.rstrip('/')}.json"


@dataclasses.dataclass(frozen=True)
class Root:
    """The root of an experiment.

    Attributes:
        uri: the root; a bare path becomes an absolute `file:` URI.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", storage.to_uri(self.uri))

    def table(self, *parts: str) -> str:
        """URI of the table `tables/<parts>`; without parts, of the folder of all tables."""
        return storage.join(self.uri, "tables", *parts)

    def refined(self, *corpus: str) -> str:
        """URI of a corpus; without a name, of the folder of all corpora."""
        return self.table("refined", *corpus)

    def cuts(self, *corpus: str) -> str:
        """URI of the counts of a followed corpus; without a name, of the folder of all of them."""
        return self.table("cuts", *corpus)

    def pinned(self, corpus: str, version: int) -> str:
        """Returns the URI of the copy of a pinned version.

        Args:
            corpus: name of the corpus.
            version: number of the version.
        """
        return self.table("pinned", corpus, str(version))

    def packed(self, *parts: str) -> str:
        """URI of the sequences `packed/<corpus>/<tokenizer>`, or of a folder above them."""
        return self.table("packed", *parts)

    @property
    def chunking_record(self) -> str:
        """URI of the record of the chunking of documents and of the splits (pool, reference, heldout)."""
        return self.table("instances.json")

    def checkpoint(self, *query: str) -> str:
        """URI of the checkpoint of a query or a training; without a name, of the folder of all checkpoints."""
        return storage.join(self.uri, "_checkpoints", *query)

    def model(self, *parts: str) -> str:
        """URI of a model folder or of a file in it; without parts, of the folder of all models."""
        return storage.join(self.uri, "models", *parts)

    def model_record(self, alias: str) -> str:
        """Returns the URI of the record of a scored model.

        Args:
            alias: the model's alias.
        """
        return self.model(f"{alias}.json")

    def proxy(self, *parts: str) -> str:
        """URI of a file or folder of the proxy."""
        return storage.join(self.uri, "proxy", *parts)

    def exports(self, *parts: str) -> str:
        """URI of an export; without parts, of the folder of all exports."""
        return storage.join(self.uri, "exports", *parts)

    def lease(self, name: str) -> str:
        """Returns the URI of the file of a lease.

        Args:
            name: name of the lease: `score`, `refined-<corpus>`, ...
        """
        return storage.join(self.uri, "_leases", f"{name}.json")

    def status(self, *lease: str) -> str:
        """URI of the status file of the query that holds a lease; without a name, of the folder of all status files."""
        return storage.join(self.uri, "_status", *(f"{name}.json" for name in lease))

    def stage(self, name: str) -> str:
        """Returns the URI of the record of a stage's last run.

        Args:
            name: name of the stage: `ingest`, `score`, ...
        """
        return storage.join(self.uri, "_stages", f"{name}.json")
