"""The session's settings: what conf/spark says and what the jobs set themselves must be one."""

import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from py4j.java_gateway import JavaPackage

from jobs import session, spark_jars
from miniplm_udf.errors import ConfigError
from miniplm_udf.streams import spark_log

CONF = Path(__file__).resolve().parents[2] / "conf" / "spark"


def properties(path: Path) -> dict[str, str]:
    lines = [line.split(None, 1) for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {key: value.strip() for key, value in lines}


def test_the_property_files_name_deltas_jars_as_the_session_does() -> None:
    for path in CONF.glob("*.conf"):
        found = properties(path)
        assert found["spark.jars.packages"] == spark_jars.DELTA_PACKAGES[0]
        assert found["spark.jars.excludes"] == ",".join([*spark_jars.EXCLUDES, "org.apache.hadoop:hadoop-aws"])


@pytest.mark.parametrize("with_s3", [False, True])
def test_cached_jars_are_used_without_resolving(with_s3: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    packages = spark_jars.DELTA_PACKAGES + (spark_jars.S3_PACKAGES if with_s3 else ())
    assert spark_jars.jar_properties(with_s3, {})["spark.jars.packages"] == ",".join(packages)
    jars = tmp_path / "ivy" / "jars"
    jars.mkdir(parents=True)
    names = spark_jars._DELTA_JARS + (spark_jars._S3_JARS if with_s3 else ())
    for name in names[:-1]:
        (jars / name).touch()
    assert "spark.jars.packages" in spark_jars.jar_properties(with_s3, {}), "a cache that lacks a jar is no cache"
    (jars / names[-1]).touch()
    cached = spark_jars.jar_properties(with_s3, {})
    assert cached["spark.jars"].count(str(jars)) == len(names)
    assert ("miniplm-s3.jar" in cached["spark.jars"]) == with_s3
    assert "spark.jars.packages" not in cached


def test_jars_of_the_user_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    given = {"spark.jars.packages": "org.apache.hadoop:hadoop-azure:3.5.0", "spark.jars": "/a.jar, /b.jar"}
    found = spark_jars.jar_properties(False, given)
    assert found["spark.jars.packages"] == f"{spark_jars.DELTA_PACKAGES[0]},{given['spark.jars.packages']}"
    assert found["spark.jars"] == "/a.jar,/b.jar"


def test_the_jar_for_s3_is_made_from_the_sources_next_to_it() -> None:
    jar = Path(spark_jars.s3_commits_jar())
    sources = sorted(jar.parent.glob("*.java"))
    with zipfile.ZipFile(jar) as archive:
        assert [f"miniplm/s3/{source.name}" for source in sources] == sorted(
            name for name in archive.namelist() if name.endswith(".java")
        )
        for source in sources:
            assert archive.read(f"miniplm/s3/{source.name}") == source.read_bytes(), "run: make s3-jar"
            assert f"miniplm/s3/{source.stem}.class" in archive.namelist()


@pytest.mark.parametrize(
    "key", ["spark.executorEnv.OPENAI_API_KEY", "spark.hadoop.fs.s3a.access.key", "spark.x.token", "AWS_ACCESS_KEY_ID"]
)
def test_sparks_pages_hide_keys(key: str) -> None:
    assert re.search(session._defaults(1)["spark.redaction.regex"], key)


def test_a_driver_without_deltas_jars_is_refused() -> None:
    stopped: list[bool] = []
    package = JavaPackage("io.delta.tables.DeltaTable", None)
    delta = SimpleNamespace(delta=SimpleNamespace(tables=SimpleNamespace(DeltaTable=package)))
    without = SimpleNamespace(_jvm=SimpleNamespace(io=delta), stop=lambda: stopped.append(True))
    with pytest.raises(ConfigError, match=r"^spark\.jars\.packages: expected Delta's jars .* --properties-file"):
        spark_jars.require_classes(without, with_s3=False)  # type: ignore[arg-type]
    assert stopped == [True]


def java_option() -> str | None:
    return spark_log.start_properties().get("spark.driver.defaultJavaOptions")


def test_a_new_jvm_reads_the_log_settings_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*spark_log._JAVA_OPTIONS, "LOG4J_CONFIGURATION_FILE", "MINIPLM_SPARK_LOG_LEVEL", "MINIPLM_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    (tmp_path / "log4j2.properties.template").touch()
    option = java_option()
    assert option is not None
    key, _, uri = option.partition("=")
    assert key == "-Dlog4j2.configurationFile"
    assert " " not in uri
    assert "NativeCodeLoader" in Path(url2pathname(urlsplit(uri).path)).read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SPARK_SUBMIT_OPTS", "-Dlog4j2.configurationFile=/mine.xml"),
        ("LOG4J_CONFIGURATION_FILE", "/mine.xml"),
        ("MINIPLM_SPARK_LOG_LEVEL", "ERROR"),
        ("MINIPLM_LOG_LEVEL", "DEBUG"),
        ("SPARK_CONF_DIR", "{folder}"),
    ],
)
def test_log_settings_of_the_user_stay(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log4j2.properties").touch()
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path / "none"))
    for other in ("MINIPLM_SPARK_LOG_LEVEL", "MINIPLM_LOG_LEVEL"):
        monkeypatch.delenv(other, raising=False)
    assert java_option() is not None
    monkeypatch.setenv(name, value.format(folder=tmp_path))
    assert java_option() is None
