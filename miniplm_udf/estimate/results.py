"""The result of `miniplm estimate`, as frozen dataclasses; the command prints them as JSON under the same names."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpus:
    """GPUs that an estimate is made for.

    Attributes:
        n: number of GPUs.
        mfu: share of their peak that scoring uses, 0 to 1.
        tflops: peak of one GPU in the models' dtype, in TFLOP/s.
    """

    n: int = 1
    mfu: float = 0.4
    tflops: float = 989.0

    def seconds(self, flops: float) -> float:
        """Returns the seconds that all the GPUs together need for some work.

        Args:
            flops: floating-point operations of the work.
        """
        return flops / (self.n * self.mfu * self.tflops * 1e12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFacts:
    """The sample that was read.

    Attributes:
        rows: rows of the input.
        read_bytes: stored bytes that the rows were read from.
        share: share of the input that these bytes are, 0 to 1.
        files_tried: files that were opened.
        seconds: duration of reading and measuring the sample.
    """

    rows: int
    read_bytes: int
    share: float
    files_tried: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusEstimate:
    """The whole corpus.

    Attributes:
        files: files of the input.
        input_bytes: bytes of the input, as it is stored.
        text_bytes: UTF-8 bytes of the texts.
        documents: documents.
        instances: rows of the table `instances`.
        by_split: instances by split.
    """

    files: int
    input_bytes: int
    text_bytes: int
    documents: int
    instances: int
    by_split: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelEstimate:
    """The scoring of the corpus with one model.

    Attributes:
        parameters: parameters of the model.
        dtype: dtype of the forward pass.
        device: device that the model was measured on.
        fresh_weights: whether the model is not trained yet and was measured with random weights.
        tokens: tokens to score.
        flops: model FLOPs of all forward passes.
        tokens_per_second: measured rate, in scored tokens.
        timed_tokens: scored tokens that the rate was measured on.
        start_seconds: time to load the model, and the time that its first batch takes longer than later batches; a job
            does not wait for compilation.
        seconds: duration with one scorer at the measured rate.
        gpu_seconds: duration on the GPUs of the estimate.
        prefix: what stands in front of each text and why, in words.
        warnings: warnings about the model.
    """

    parameters: int
    dtype: str
    device: str
    fresh_weights: bool
    tokens: int
    flops: float
    tokens_per_second: float
    timed_tokens: int
    start_seconds: float
    seconds: float
    gpu_seconds: float
    prefix: str
    warnings: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """The training of the reference.

    Attributes:
        tokens: tokens that it is trained on.
        flops: model FLOPs of all steps, forward and backward.
        tokens_per_second: measured rate.
        seconds: duration at the measured rate.
        gpu_seconds: duration on the GPUs of the estimate.
    """

    tokens: int
    flops: float
    tokens_per_second: float
    seconds: float
    gpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """The score stage: each worker loads every model once, and the instances are divided between the workers.

    Attributes:
        workers: scorers that run at the same time.
        model_seconds: seconds of scoring with all models, of one worker.
        start_seconds: seconds of loading all models.
        spark_seconds: seconds of the stage without its models.
        stage_seconds: duration of the stage.
        gpu_seconds: seconds of scoring with all models, on the GPUs of the estimate.
    """

    workers: int
    model_seconds: float
    start_seconds: float
    spark_seconds: float
    stage_seconds: float
    gpu_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectEstimate:
    """Rejects of one stage.

    Attributes:
        reasons: rejects by reason.
        of: rows (ingest), or pairs of an instance and a model (score).
        share: rejects as a share of these, 0 to 1.
        max_share: the stage's `max_reject_share`.
        too_many: whether the share is larger.
    """

    reasons: dict[str, int]
    of: int
    share: float
    max_share: float
    too_many: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The result of `miniplm estimate`.

    Attributes:
        sample: the sample that was read.
        corpus: the whole corpus.
        models: scoring, by model alias.
        reference_training: None if no reference has to be trained.
        score: the score stage.
        tables: bytes of `scores` and `score_matrix`.
        rejects: rejects by stage (ingest, score).
        too_many_rejects: whether a stage would reject more than its `max_reject_share`.
        gpus: the GPUs that `gpu_seconds` is for.
    """

    sample: SampleFacts
    corpus: CorpusEstimate
    models: dict[str, ModelEstimate]
    reference_training: TrainingEstimate | None
    score: StageEstimate
    tables: dict[str, int]
    rejects: dict[str, RejectEstimate]
    too_many_rejects: bool
    gpus: Gpus
