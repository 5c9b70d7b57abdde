"""Where everything lies under the root of an experiment. No other module builds these paths or takes them apart.

    <root>/tables/<table>                     one Delta table per name in `schemas`
    <root>/tables/instances.json              how the instances were cut and split
    <root>/tables/refined/<corpus>            versions of a corpus;  cuts/<corpus>: the running cut of a followed corpus
    <root>/tables/pinned/<corpus>/<version>   copy of a pinned version
    <root>/tables/packed/<corpus>/<tokenizer> token sequences
    <root>/_checkpoints/<query>               checkpoint of a streaming query;  <query>.json: facts about the query
    <root>/_checkpoints/train/<name>          checkpoints of the training of a model
    <root>/models/<name>                      models of the trainer;  <alias>.json: record of a scored model
    <root>/models/tokenizer_<name>            a tokenizer that text is packed with
    <root>/proxy/...                          the proxy's record, model and report
    <root>/exports/<name>                     exports for which the user named no other folder
    <root>/_leases, _status, _stages          which driver runs, how far its queries are, the record of each stage

Input: the URI of a root; output: URIs, and paths below the root for messages. The names of the tables in folders are
made in `schemas/table_names.py`. Reads and writes no file. Imports no Spark and no torch.
"""

import dataclasses

from miniplm_udf import storage
from miniplm_udf.schemas import table_names

_TABLES = "tables"
_TOKENIZER = "tokenizer_"

# Records in a model folder or a tokenizer folder; their keys are declared in `store.model_records`.
TRAINING_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"
TOKENIZER_RECORD_FILE = "miniplm.json"


def query_facts(checkpoint_uri: str) -> str:
    """Returns the URI of the facts about a query: a file next to its checkpoint folder, which belongs to Spark.

    Args:
        checkpoint_uri: the checkpoint folder, with or without a trailing slash.
    """
    return f"{checkpoint_uri.rstrip('/')}.json"


def shown_table(name: str) -> str:
    """Path of the table `name` below any root, for messages: `tables/scores`."""
    return f"{_TABLES}/{name}"


def is_tokenizer_folder(name: str) -> bool:
    """Whether `name` in the folder of all models is the folder of a tokenizer."""
    return name.startswith(_TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Root:
    """The root of an experiment.

    Attributes:
        uri: the root; a bare path becomes an absolute `file:` URI.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", storage.to_uri(self.uri))

    def relative(self, uri: str) -> str:
        """Path of `uri` below the root, for messages: `tables/scores`. A URI elsewhere is returned as it is."""
        return uri.removeprefix(f"{self.uri.rstrip('/')}/")

    def table(self, *parts: str) -> str:
        """URI of the table `tables/<parts>`; without parts, of the folder of all tables."""
        return storage.join(self.uri, _TABLES, *parts)

    def table_name(self, uri: str) -> str | None:
        """Name of the table in the folder `uri`; None if the folder is not below the folder of all tables."""
        folder = f"{self.table()}/"
        return uri.removeprefix(folder) if uri.startswith(folder) else None

    def refined(self, *corpus: str) -> str:
        """URI of a corpus; without a name, of the folder of all corpora."""
        return self.table(table_names.REFINED, *corpus)

    def cuts(self, *corpus: str) -> str:
        """URI of the counts of a followed corpus; without a name, of the folder of all of them."""
        return self.table(table_names.CUTS, *corpus)

    def pinned(self, corpus: str, version: int) -> str:
        """Returns the URI of the copy of a pinned version.

        Args:
            corpus: name of the corpus.
            version: number of the version.
        """
        return self.table(table_names.pinned(corpus, version))

    def packed(self, *parts: str) -> str:
        """URI of the sequences `packed/<corpus>/<tokenizer>`, or of a folder above them."""
        return self.table(table_names.PACKED, *parts)

    @property
    def chunking_record(self) -> str:
        """URI of the record of the chunking of documents and of the splits (pool, reference, heldout)."""
        return self.table("instances.json")

    def checkpoint(self, *query: str) -> str:
        """URI of the checkpoint of a query; without a name, of the folder of all checkpoints."""
        return storage.join(self.uri, "_checkpoints", *query)

    def training(self, name: str) -> str:
        """URI of the checkpoints of the training of the model `name`."""
        return self.checkpoint("train", name)

    def model(self, *parts: str) -> str:
        """URI of a model folder or of a file in it; without parts, of the folder of all models."""
        return storage.join(self.uri, "models", *parts)

    def model_record(self, alias: str) -> str:
        """Returns the URI of the record of a scored model.

        Args:
            alias: the model's alias.
        """
        return self.model(f"{alias}.json")

    def tokenizer(self, name: str, *file: str) -> str:
        """URI of the folder of the tokenizer `name` that text is packed with, or of a `file` in it."""
        return self.model(f"{_TOKENIZER}{name}", *file)

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

    def probe(self, name: str) -> str:
        """Returns the URI of an object that tries whether the storage can be written.

        Args:
            name: name of the object, which no other process uses.
        """
        return storage.join(self.uri, "_probe", name)

    def status(self, *lease: str) -> str:
        """URI of the status file of the query that holds a lease; without a name, of the folder of all status files."""
        return storage.join(self.uri, "_status", *(f"{name}.json" for name in lease))

    def stage(self, *name: str) -> str:
        """Returns the URI of the record of a stage's last run; without a name, of the folder of all records.

        Args:
            name: name of the stage: `ingest`, `score`, ...
        """
        return storage.join(self.uri, "_stages", *(f"{each}.json" for each in name))
