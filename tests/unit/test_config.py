"""The config: the shipped files resolve, overrides win, students inherit, and every mistake is named."""

from pathlib import Path

import pytest

from miniplm_udf.config.experiment import ExperimentConfig, fingerprint, load_config, printable, to_dict, to_yaml
from miniplm_udf.config.report import ReportConfig
from miniplm_udf.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
DEMO = CONF / "demo.yaml"


def test_shipped_files_resolve() -> None:
    demo, pile = load_config(DEMO), load_config(CONF / "pile_qwen.yaml")
    assert list(demo.models) == ["teacher", "reference"]
    assert pile.models["teacher"].path == "Qwen/Qwen1.5-1.8B"
    # The paper's recipe is the default: the file repeats no part of the recipe.
    recipe = pile.students["qwen_200m"].train
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_eps) == (0.9, 0.98, 1e-6)
    assert (recipe.steps, recipe.batch_sequences, recipe.warmup_steps, recipe.loss) == (100_000, 512, 2000, "official")
    rates = {name: student.train.learning_rate for name, student in pile.students.items()}
    assert rates["qwen_200m"] == rates["qwen_200m_conventional"] == 6e-4
    assert rates["qwen_1_2b"] == 2.5e-4


def test_overrides_win_and_are_yaml() -> None:
    config = load_config(DEMO, ["ingest.input=[a, b]", "models.teacher.context_tokens=64", "root=/x/y/",
                                "models.teacher.window_overlap_tokens=8"])  # fmt: skip
    assert config.ingest.inputs == ["a", "b"]
    assert config.models["teacher"].context_tokens == 64
    assert config.root == "file:///x/y"
    assert config.layout.table("scores") == "file:///x/y/tables/scores"


def test_an_override_of_one_student_leaves_its_anchors_others_alone() -> None:
    config = load_config(DEMO, ["students.miniplm.architecture.hidden_size=96"])
    assert config.students["miniplm"].architecture["hidden_size"] == 96
    assert config.students["conventional"].architecture["hidden_size"] == 192


def test_a_value_that_is_no_yaml_is_text() -> None:
    assert load_config(DEMO, ["ingest.input=*.jsonl"]).ingest.inputs == ["*.jsonl"]
    assert load_config(DEMO, ["ingest.input={a,b}/*.jsonl"]).ingest.inputs == ["{a,b}/*.jsonl"]


@pytest.mark.parametrize(
    "text", ["a #b", "a: b", "no", "1e3", "2024-01-01", "null", "~x", "&a", "*a", "!a", "'a'", "{a}", "[a", "%"]
)
def test_text_stays_as_it_was_typed(text: str) -> None:
    overrides = [f"ingest.default_source={text}", f"mlflow.experiment={text}", f"spark.conf.spark.app.x={text}"]
    config = load_config(DEMO, [*overrides, f"ingest.input={text}"])
    assert (config.ingest.default_source, config.mlflow.experiment) == (text, text)
    assert config.spark.conf == {"spark.app.x": text}
    assert config.ingest.inputs == [text]


def test_paths_stay_as_they_were_typed(tmp_path: Path) -> None:
    assert load_config(DEMO, [f"root={tmp_path}/a #b"]).root == f"file://{tmp_path}/a #b"
    assert load_config(DEMO, ["ingest.input=[no, 2024-01-01]"]).ingest.inputs == ["no", "2024-01-01"]
    assert load_config(DEMO, ["models.teacher.revision=1e3"]).models["teacher"].revision == "1e3"
    assert load_config(DEMO, ["models.teacher.revision=null"]).models["teacher"].revision is None


def test_places_that_cannot_be_used_are_refused_before_anything_runs() -> None:
    for override in ("root=/data/[x]", "root=/data/a%25", "root=$HOME/x", "report.folder=/data/a?b"):
        with pytest.raises(
            ConfigError, match=rf"^{override.partition('=')[0]}: expected a place without .* at position"
        ):
            load_config(DEMO, [override])


def test_an_empty_section_is_its_default() -> None:
    assert load_config(DEMO, ["pack=null"]).pack.sequence_length == 1024


def test_what_is_printed_holds_no_secret() -> None:
    config = load_config(
        DEMO,
        [
            "root=s3a://key:hidden1@bucket/x",
            "mlflow.tracking_uri=https://user:hidden2@host",
            "spark.conf={spark.hadoop.fs.s3a.secret.key: hidden3, spark.hadoop.fs.s3a.endpoint: http://here}",
        ],
    )
    shown = str(printable(to_dict(config)))
    assert "hidden1" not in shown
    assert "hidden2" not in shown
    assert "hidden3" not in shown
    assert "http://here" in shown


@pytest.mark.parametrize(
    "key",
    [
        "spark.hadoop.fs.s3a.access.key", "spark.hadoop.fs.azure.account.key.ACCOUNT.dfs.core.windows.net",
        "spark.executorEnv.HF_TOKEN", "spark.executorEnv.AWS_SESSION_TOKEN", "spark.executorEnv.WANDB_API_KEY",
        "spark.hadoop.google.cloud.auth.service.account.private.key", "spark.ssl.keyPassword", "token",
    ],
)  # fmt: skip
def test_values_of_secret_keys_are_hidden(key: str) -> None:
    assert printable({key: "hidden4"}) == {key: "(hidden)"}


@pytest.mark.parametrize("key", ["bos_token", "tokens_of", "tokenizer", "max_tokens", "prompt_tokens"])
def test_values_of_our_own_keys_are_shown(key: str) -> None:
    assert printable({"section": {key: "shown"}}) == {"section": {key: "shown"}}


def test_train_section_is_inherited_key_by_key() -> None:
    config = load_config(DEMO, ["train.weight_decay=0.5", "students.miniplm.train.warmup_steps=3"])
    assert config.reference is not None
    assert config.students["miniplm"].train.weight_decay == 0.5
    assert config.students["miniplm"].train.warmup_steps == 3
    assert config.students["conventional"].train.warmup_steps == config.train.warmup_steps
    assert config.reference.train.weight_decay == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ingest.inptu=3", r"unknown key ingest\.inptu; did you mean 'input'\?"),
        (
            "models.teacher.contxt_tokens=3",
            r"unknown key models\.teacher\.contxt_tokens; did you mean 'context_tokens'",
        ),
        ("students.miniplm.trian.steps=3", r"students\.miniplm\.trian; did you mean 'train'"),
        ("train.steps=abc", "abc"),
        ("ingest.chunking.mode=paged", "'document', 'packed'"),
        ("students.miniplm.corpus=diference", "did you mean 'difference'"),
        ("train.warmup_steps=100000", "warmup_steps"),
        ("refine.corpora.difference.select.ratio=2", "ratio above 0 and at most 1, found 2"),
        ("models.teacher.path=null", r"models\.teacher\.path"),
        ("refine.corpora.bad-name={}", "letters, digits and _"),
        ("root=", "root"),
        ("novalue", "key=value"),
        ("students.reference={architecture: {}, corpus: random, tokenizer: bpe8k}", "choose another"),
        ("score.max_bytes_per_trigger=banana", "512m or 1g"),
        ("ingest.state_partitions=0", "at least 1, found 0"),
        ("score.sample=0", r"score\.sample: expected a share above 0 and at most 1, found 0"),
        ("proxy.heldout=1", "between 0 and 1, found 1"),
        ("proxy.rows=2000000", "1 to 1000000, found 2000000"),
        ("refine.corpora.difference.candidates=proxy_scores", "rule: a rule ranks what models have scored"),
        ("refine.corpora.random.candidates=proxy_scores", "expected the section proxy"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO, [override])


@pytest.mark.parametrize(
    ("shares", "values"),
    [
        (["reference=1.0", "heldout=0.0"], "1.0 + 0.0"),
        (["heldout=0.0", "reference=1.0"], "1.0 + 0.0"),
        (["reference=0.6", "heldout=0.5"], "0.6 + 0.5"),
        (["reference=2", "heldout=-1"], "2.0 + -1.0"),
        (["heldout=2.0"], "0.35 + 2.0"),
    ],
)
def test_one_mistake_of_two_keys_is_named_once(shares: list[str], values: str) -> None:
    """A default that takes the place of one of the keys makes no second problem."""
    with pytest.raises(ConfigError) as raised:
        load_config(DEMO, [f"ingest.split.{share}" for share in shares])
    expected = "ingest.split: expected shares of at least 0 that sum to less than 1, found "
    assert str(raised.value) == expected + values


def test_no_file_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(tmp_path / "list.yaml")


def test_the_report_of_a_remote_root_is_there_and_mlflow_in_this_nodes_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    remote = ExperimentConfig(root="s3a://bucket/team/run 1/")
    assert remote.report_file("report.html") == "s3a://bucket/team/run 1/report.html"
    folder = remote.local_folder()
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("bucket-team-run-1-")
    assert remote.mlflow_uri() == f"sqlite:///{folder}/mlflow.db"
    assert remote.artifact_uri() == (folder / "mlartifacts").as_uri()
    # Each root has a folder of its own, and no secret is in its name.
    assert ExperimentConfig(root="s3a://bucket/team-run/1").local_folder() != folder
    assert "secret" not in str(ExperimentConfig(root="s3a://key:secret@bucket/x").local_folder())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert (remote.mlflow_uri(), remote.artifact_uri()) == ("http://mlflow:5000", None)


def test_the_local_place_is_the_report_folder_else_the_root(tmp_path: Path) -> None:
    for report, root, local in (
        (None, str(tmp_path), tmp_path),
        (str(tmp_path / "r"), "s3a://bucket/x", tmp_path / "r"),
        ("s3a://bucket/r", str(tmp_path), tmp_path),
    ):
        config = ExperimentConfig(root=root, report=ReportConfig(folder=report))
        assert config.local_folder() == local
        assert config.report_file("summary.json") == f"{report or root}/summary.json"


def test_fingerprint_is_of_the_content() -> None:
    first, same = load_config(DEMO), load_config(DEMO)
    other = load_config(DEMO, ["score.workers=2"])
    assert fingerprint(first.score, {"a": 1, "b": 2}) == fingerprint(same.score, {"b": 2, "a": 1})
    assert fingerprint(first.score) != fingerprint(other.score)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_config_is_read_again(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
