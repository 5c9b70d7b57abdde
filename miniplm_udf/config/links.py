"""The checks between the sections of an experiment: names that stand for something in another section, and lengths.

Input: the sections (`ExperimentConfig` inherits `LinkedSections`). Output: problems, each a sentence with its key and
its remedy. Each section checks its own values when it is made. Imports nothing heavy; reads no file.
"""

import dataclasses
from collections.abc import Collection, Iterator

from miniplm_udf.config.evaluate import EvaluateConfig
from miniplm_udf.config.generate import GENERATED, GenerateConfig
from miniplm_udf.config.keys import nearest
from miniplm_udf.config.refine import CorpusConfig, RefineConfig
from miniplm_udf.config.rules import DEFAULT, load_rules, resolve
from miniplm_udf.config.sections import (
    IngestConfig,
    ModelConfig,
    ProxyConfig,
    ScoreConfig,
    TokenizerConfig,
)
from miniplm_udf.config.tracking import MlflowConfig
from miniplm_udf.config.training import ReferenceConfig, StudentConfig, TrainConfig
from miniplm_udf.config.values import name_problem
from miniplm_udf.layout import is_tokenizer_folder

# The key, the name that it holds, the names that it may hold.
Link = tuple[str, str, Collection[str]]


class LinkedSections:
    """The sections that name each other, with what follows from them together."""

    models: dict[str, ModelConfig]
    ingest: IngestConfig
    reference: ReferenceConfig | None
    score: ScoreConfig
    proxy: ProxyConfig | None
    refine: RefineConfig
    generate: GenerateConfig | None
    tokenizers: dict[str, TokenizerConfig]
    students: dict[str, StudentConfig]
    evaluate: EvaluateConfig
    mlflow: MlflowConfig

    @property
    def scored_aliases(self) -> list[str]:
        """Aliases of the models that score, in the order of `models`."""
        return [alias for alias in self.models if not self.score.models or alias in self.score.models]

    @property
    def trainable_corpora(self) -> list[str]:
        """Names of the corpora that a student may name: refined ones, and `generated` with the section `generate`."""
        return [*self.refine.corpora, *([GENERATED] if self.generate else [])]

    @property
    def trained_alias(self) -> str | None:
        """Alias of the model that this experiment trains as its reference; None without the section `reference`."""
        return self.reference.alias if self.reference else None

    def link_problems(self) -> Iterator[str]:
        """Yields what does not fit between the sections."""
        yield from self._name_problems()
        yield from self._unknown_names()
        yield from self._corpus_problems()
        yield from self._model_problems()
        yield from self._teacher_problems()
        if self.generate and self.generate.model in self.models:
            yield from self._generate_problems(self.generate, self.models[self.generate.model])

    def _name_problems(self) -> Iterator[str]:
        for kind, names in (("model", self.models), ("tokenizer", self.tokenizers), ("student", self.students)):
            yield from filter(None, (name_problem(kind, name) for name in names))
        for name in self.students:
            if name in self.models or is_tokenizer_folder(name):
                yield f"student {name!r}: <root>/models has a folder of that name for a model; choose another name"
        if self.mlflow.parent_run in {*self.students, *self.models, "comparison"}:
            yield f"mlflow.parent_run: other runs are named {self.mlflow.parent_run!r}; choose another name"

    def _unknown_names(self) -> Iterator[str]:
        for key, name, known in self._links():
            if name not in known:
                yield f"{key}: expected one of {sorted(known)}, found {name!r}{nearest(name, known)}"

    def _links(self) -> Iterator[Link]:
        for alias in self.score.models:
            yield "score.models", alias, self.models
        if self.ingest.inputs:
            yield "ingest.chunking.tokenizer", self.ingest.chunking.tokenizer, self.models
        if self.reference:
            yield "reference.alias", self.reference.alias, self.models
            yield "reference.tokenizer", self.reference.tokenizer, self.models
        if self.refine.corpora or self.proxy:
            yield "refine.tokens_of", self.refine.tokens_of, self.scored_aliases
        if self.proxy and self.proxy.score is None:
            for role in load_rules()[DEFAULT].models:
                yield "proxy.score: miniplm", role, self.scored_aliases
        for name, corpus in self.refine.corpora.items():
            yield from self._rule_links(f"refine.corpora.{name}", corpus)
        for name, student in self.students.items():
            yield f"students.{name}.corpus", student.corpus, self.trainable_corpora
            yield f"students.{name}.tokenizer", student.tokenizer, self.tokenizers
            if student.train.kd_ratio:
                # The reference that this experiment trains is no teacher.
                teachers = self.models.keys() - {self.trained_alias}
                yield f"students.{name}.train.kd_teacher", student.train.kd_teacher, teachers
        if self.generate:
            yield "generate.model", self.generate.model, self.models

    def _rule_links(self, place: str, corpus: CorpusConfig) -> Iterator[Link]:
        """The names of a corpus: its rule, the roles that it replaces, and the rule's models, which must be scored."""
        if corpus.rule is None:
            return
        rules = load_rules()
        yield f"{place}.rule", corpus.rule, rules
        if corpus.rule in rules:
            roles = rules[corpus.rule].models
            for role in corpus.aliases:
                yield f"{place}.aliases", role, roles
            for role in roles:
                yield f"{place}.rule: {corpus.rule}: {role}", corpus.aliases.get(role, role), self.scored_aliases

    def _corpus_problems(self) -> Iterator[str]:
        for name, corpus in self.refine.corpora.items():
            if corpus.is_of_proxy and self.proxy is None:
                yield (
                    f"refine.corpora.{name}.candidates: expected the section proxy, which makes proxy_scores, found "
                    "none (`proxy: {}` takes the defaults)"
                )
            # A resolved corpus, read from a version's provenance, has both a rule and a score.
            is_rule = corpus.rule is not None and corpus.rule in load_rules()
            if is_rule and corpus.score not in (None, resolve(dataclasses.replace(corpus, score=None)).score):
                yield (
                    f"refine.corpora.{name}: expected a rule or a score, found rule {corpus.rule!r} and score "
                    f"{corpus.score!r}; remove one of them"
                )

    def _model_problems(self) -> Iterator[str]:
        for alias, model in self.models.items():
            if model.path is None and alias != self.trained_alias:
                yield (
                    f"models.{alias}.path: expected a folder, a hub name or a .gguf file, found nothing "
                    f"(only the model that the section reference trains needs none); set models.{alias}.path"
                )
        for key, alias in self._loaded().items():
            if alias in self.models and self.models[alias].server is not None:
                yield f"{key}: expected a model with `backend: local`, since a server only scores, found models.{alias}"
        by_name: dict[tuple[str, str], str] = {}
        for alias in self.scored_aliases:
            if (server := self.models[alias].server) is None:
                continue
            first = by_name.setdefault((server.model, server.revision), alias)
            other = self.models[first].server
            if other is not None and other.url.rstrip("/") != server.url.rstrip("/"):
                yield (
                    f"models.{alias}.server.revision: expected another than models.{first}.server.revision, since "
                    "scores are kept by the server's model and revision and these are two servers, found "
                    f"{server.revision!r} in both"
                )

    def _loaded(self) -> dict[str, str]:
        """The aliases of the models that do more than score, by the key that names them."""
        loaded = {f"students.{name}.train.kd_teacher": train.kd_teacher for name, train in self._distilled().items()}
        if self.generate:
            loaded["generate.model"] = self.generate.model
        if self.reference:
            loaded["reference.alias"] = self.reference.alias
        return loaded

    def _distilled(self) -> dict[str, TrainConfig]:
        return {name: student.train for name, student in self.students.items() if student.train.kd_ratio}

    def _teacher_problems(self) -> Iterator[str]:
        for name, train in self._distilled().items():
            tokenizer = self.students[name].tokenizer
            if tokenizer in self.tokenizers and self.tokenizers[tokenizer].path is None:
                yield (
                    f"students.{name}.tokenizer: expected the tokenizer of the teacher models.{train.kd_teacher}, "
                    f"found {tokenizer!r}, which is trained on the corpus; set tokenizers.{tokenizer}.path "
                    "to the teacher's path, or kd_ratio: 0 for this student"
                )
            if train.kd_teacher in self.models and self.models[train.kd_teacher].device_map is not None:
                yield (
                    f"students.{name}.train.kd_teacher: expected a model that fits on one GPU next to the student "
                    f"(device_map: null), found models.{train.kd_teacher} with device_map: auto"
                )

    def _generate_problems(self, generate: GenerateConfig, model: ModelConfig) -> Iterator[str]:
        """The lengths of `generate`, against the model's context and the instances."""
        if model.path is None:
            yield f"generate.model: expected a model with a path, found {generate.model!r}, which is trained here"
        context, n_tokens = model.context_tokens, generate.prompt_tokens + generate.new_tokens
        if n_tokens > context:
            yield (
                f"generate: expected prompt_tokens + new_tokens of at most models.{generate.model}.context_tokens "
                f"({context}), found {n_tokens}: lower generate.prompt_tokens or generate.new_tokens, or name a model "
                "with a longer context in generate.model"
            )
        chunking = self.ingest.chunking
        if chunking.tokenizer == generate.model and generate.prompt_tokens >= chunking.max_tokens:
            yield (
                f"generate.prompt_tokens: expected less than ingest.chunking.max_tokens ({chunking.max_tokens}), found "
                f"{generate.prompt_tokens}: no instance would be longer than its prompt; lower generate.prompt_tokens"
            )
        if GENERATED in self.refine.corpora:
            yield (
                f"refine.corpora.{GENERATED}: expected another name, because the section generate makes a corpus of "
                "this name; rename it"
            )
