"""Where things stand: imports of the tests, the import contract, names of classes, places under a root; and how they
are described: arguments of public functions, dicts with undeclared keys.

Reads source files alone. Each function that looks for mistakes is also given a mistake, so that no test here is always
green.
"""

import ast
import configparser
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("jobs", "miniplm_udf", "trainer")
PLACES = ("tables", "_checkpoints", "models")


def sources(*folders: str) -> dict[str, str]:
    """Text of each Python file under folders of the repository, by its path in the repository."""
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    return {str(file.relative_to(REPOSITORY)): file.read_text(encoding="utf-8") for file in sorted(files)}


def imported_modules(source: str) -> set[str]:
    """Dotted names that a source file imports, anywhere in it, and in code that it holds as a string."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            names |= {word.strip(";,'\"") for word in node.value.split() if word.startswith("tests.")}
    return names


def imports_of_tests(files: dict[str, str]) -> list[str]:
    """Imports of a test module or of a conftest, as "file imports module"."""
    return [
        f"{path} imports {module}"
        for path, source in files.items()
        for module in sorted(imported_modules(source))
        if any(is_test_module(".".join(module.split(".")[:n])) for n in (2, 3))
    ]


def is_test_module(name: str) -> bool:
    """Whether a dotted name of two or three parts is a test module or a conftest."""
    last = name.split(".")[-1]
    return name.startswith("tests.") and (last == "conftest" or last.startswith("test_"))


def test_no_test_module_is_imported() -> None:
    files = sources("tests")
    files.pop("tests/unit/test_house.py")  # its mistakes below are no imports
    assert imports_of_tests(files) == []
    mistakes = {
        "tests/a.py": "from tests.unit.test_house import sources",
        "tests/b.py": "from tests.unit import test_house",
        "tests/c.py": "CODE = 'from tests.unit.test_house import sources'",
        "tests/d.py": "from tests.spark.conftest import demo_config",
    }
    assert {line.split(" ")[0] for line in imports_of_tests(mistakes)} == set(mistakes)


def test_helpers_live_in_support() -> None:
    """Benchmarks and the fault trials are programs of their own, next to their tests."""
    others = [
        path
        for path in map(Path, sources("tests"))
        if path.parts[1] not in ("support", "bench") and path != Path("tests/faults/run.py")
        if not path.name.startswith("test_") and path.name not in ("__init__.py", "conftest.py")
    ]
    assert others == []


def rooms_without_layer(layers: str, rooms: Iterable[str]) -> list[str]:
    """Rooms that a contract's layers do not name."""
    named = {name.strip() for line in layers.splitlines() for name in line.split("|")}
    return sorted(set(rooms) - named)


def test_every_module_stands_in_the_import_contract() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    contract = setup["importlinter:contract:library"]
    assert contract["type"] == "layers"
    assert contract.getboolean("exhaustive"), "else import-linter passes over a room without a layer"
    assert contract["containers"].split() == ["miniplm_udf"]
    rooms = {path.stem for path in (REPOSITORY / "miniplm_udf").iterdir() if path.suffix == ".py" or path.is_dir()}
    rooms -= {"__init__", "__pycache__"}
    assert rooms_without_layer(contract["layers"], rooms) == []
    assert rooms_without_layer("a\nb | c", ["a", "b", "d"]) == ["d"]
    assert setup["importlinter"]["root_packages"].split() == list(PACKAGES)
    # Files outside the packages would stand in no contract.
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert folders == {*PACKAGES, "tests"}


def shared_class_names(files: dict[str, str]) -> dict[str, list[str]]:
    """Names of classes at the top of more than one file, with these files."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in files.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_two_classes_share_a_name() -> None:
    shared = shared_class_names(sources(*PACKAGES))
    assert shared == {}
    mistakes = {"a.py": "class A: ...", "b.py": "class A: ...\nclass B: ..."}
    assert shared_class_names(mistakes) == {"A": ["a.py", "b.py"]}


def joined_places(source: str) -> Iterator[str]:
    """String literals with the name of a place under a root, given to a `join` or standing in an f-string or a `/`."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Call) and (
            isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "joinpath")
        ):
            parts = node.args
        elif isinstance(node, ast.JoinedStr):
            parts = node.values if len(node.values) > 1 else []
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div | ast.Add):
            parts = [node.left, node.right]
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                if isinstance(node, ast.JoinedStr):
                    is_place = any(f"/{place}/" in f"/{part.value}" for place in PLACES) and "/" in part.value
                else:
                    is_place = any(place in part.value.split("/") for place in PLACES)
                if is_place:
                    yield f"line {node.lineno}: {part.value!r}"


# Texts for a reader, which name a place and open nothing, and the end of a URI from a root that may have been moved.
ALLOWED = {"jobs/summary.py", "miniplm_udf/upkeep/preflight.py", "miniplm_udf/corpora/takedown.py"}


def test_only_the_layout_joins_places_under_a_root() -> None:
    found = {
        path: list(joined_places(source))
        for path, source in sources(*PACKAGES).items()
        if path != "miniplm_udf/layout.py" and path not in ALLOWED
    }
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "mistake",
    [
        'storage.join(root, "tables", name)',
        'f"{root}/_checkpoints/score"',
        'root / "models"',
        'root + "/tables/scores"',
    ],
)
def test_a_join_of_a_place_is_seen(mistake: str) -> None:
    assert len(list(joined_places(mistake))) == 1


# Arguments that need no word: `self`, and those whose type says all, the session and the experiment.
UNDESCRIBED = {"self", "cls", "SparkSession", "ExperimentConfig"}


def public_functions(source: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions at the top of a file and methods of its public classes, by "name" and "class.name"."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            named = [(f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, ast.FunctionDef)]
        else:
            named = [(node.name, node)] if isinstance(node, ast.FunctionDef) else []
        yield from ((name, function) for name, function in named if not function.name.startswith("_"))


def arguments_to_describe(function: ast.FunctionDef) -> list[str]:
    """Arguments of a function, except `self`, `cls`, `*more`, `**more` and those of a type that says all."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    types = {argument.arg: ast.unparse(argument.annotation).strip("'") for argument in every if argument.annotation}
    return [name for name in (argument.arg for argument in every) if types.get(name, name) not in UNDESCRIBED]


def undescribed_arguments(files: dict[str, str]) -> list[str]:
    """Arguments of public functions that the docstring neither lists under Args nor names as `argument`.

    A method without a docstring overrides one; the class that declares it may stand in another file.
    """
    functions = [(path, *pair) for path, source in files.items() for pair in public_functions(source)]
    declared = {function.name for _, name, function in functions if "." in name and ast.get_docstring(function)}
    missing = []
    for path, name, function in functions:
        text = ast.get_docstring(function)
        if text is None and "." in name and function.name in declared:
            continue
        described = described_names(text or "")
        names = [argument for argument in arguments_to_describe(function) if argument not in described]
        missing += [f"{path}: {name}: {argument}" for argument in names]
    return missing


def described_names(docstring: str) -> set[str]:
    """Names that a docstring lists under Args, alone or as "a, b:", and names that it has in backticks."""
    _, _, after = docstring.partition("Args:\n")
    listed = re.split(r"^\w+:$", after, flags=re.MULTILINE)[0]
    heads = re.findall(r"^    (\w[\w, ]*):", listed, re.MULTILINE)
    return {name for head in heads for name in head.split(", ")} | set(re.findall(r"`(\w+)`", docstring))


def test_public_functions_describe_their_arguments() -> None:
    assert undescribed_arguments(sources(*PACKAGES)) == []


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("def f(a: int) -> int: ...", ["f: a"]),
        (
            'def f(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a: in bytes.\n    """',
            ["f: b"],
        ),
        ('def f(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a, b: in bytes.\n    """', []),
        ('def f(a: int) -> int:\n    """Doubles `a`."""', []),
        ('def f(a: int) -> int:\n    """Doubles.\n\n    Returns:\n        a: twice.\n    """', ["f: a"]),
        ("def f(spark: 'SparkSession', config: ExperimentConfig) -> None: ...", []),
        ("class C:\n    def f(self, a: int) -> int: ...", ["C.f: a"]),
        (
            'class B:\n    def f(self, a: int) -> int:\n        """Uses `a`."""\nclass C(B):\n    def f(self, a): ...',
            [],
        ),
        ("def _f(a: int) -> int: ...\nclass _C:\n    def f(self, a: int) -> int: ...", []),
    ],
)
def test_an_argument_without_a_word_is_seen(source: str, arguments: list[str]) -> None:
    assert undescribed_arguments({"a.py": source}) == [f"a.py: {argument}" for argument in arguments]


UNDECLARED_KEYS = "dict[str, Any]"


def dicts_with_undeclared_keys(files: dict[str, str]) -> list[str]:
    """Lines with the type of a dict whose keys and values may be anything, except the one that names it `Json`."""
    return [
        f"{path}: {line.strip()}"
        for path, source in files.items()
        for line in source.splitlines()
        if UNDECLARED_KEYS in line and line != f"Json = {UNDECLARED_KEYS}"
    ]


def test_json_without_declared_keys_has_one_name() -> None:
    files = sources(*PACKAGES)
    assert dicts_with_undeclared_keys(files) == []
    assert [path for path, source in files.items() if f"\nJson = {UNDECLARED_KEYS}\n" in source] == [
        "miniplm_udf/storage.py"
    ]
    mistakes = {"a.py": "def f() -> dict[str, Any]: ...", "b.py": "rows: list[dict[str, Any]] = []"}
    assert len(dicts_with_undeclared_keys(mistakes)) == 2


# How often a file may use `storage.Json`. It is for JSON from outside, or on its way out; facts of our own are
# dataclasses or TypedDicts. A new use needs a reason here.
JSON_USES = {
    # Files and settings of other programs: config files, input rows, models, tokenizers, optimizers.
    "miniplm_udf/config/experiment.py": 1,
    "miniplm_udf/config/generate.py": 1,
    "miniplm_udf/config/overrides.py": 1,
    "miniplm_udf/config/rules.py": 1,
    "miniplm_udf/config/student_models.py": 3,
    "miniplm_udf/config/training.py": 2,
    "miniplm_udf/estimate/measure.py": 1,
    "miniplm_udf/ingestion/documents.py": 4,
    "miniplm_udf/scoring/batching.py": 1,
    "miniplm_udf/scoring/gguf_facts.py": 12,
    "miniplm_udf/scoring/gguf_models.py": 3,
    "miniplm_udf/scoring/models.py": 1,
    "miniplm_udf/scoring/prefix.py": 2,
    "miniplm_udf/scoring/tokenizer.py": 3,
    "trainer/losses/lm_loss.py": 1,
    "trainer/models/model.py": 2,
    "trainer/ranks/state.py": 1,
    "trainer/targets.py": 1,
    # Delta's log, and Spark's offsets and progress.
    "miniplm_udf/store/delta_log.py": 2,
    "miniplm_udf/store/tables.py": 3,
    "miniplm_udf/streams/backlog.py": 1,
    "miniplm_udf/streams/checkpoints.py": 1,
    "miniplm_udf/streams/offsets.py": 3,
    "miniplm_udf/streams/runner.py": 3,
    # Records before their keys are checked, and configs in records, whose keys the dataclasses of `config` declare.
    "miniplm_udf/annotations/annotate.py": 1,
    "miniplm_udf/corpora/export.py": 1,
    "miniplm_udf/corpora/export_folder.py": 1,
    "miniplm_udf/ingestion/query.py": 2,
    "miniplm_udf/packing/corpus.py": 1,
    "miniplm_udf/refinement/refine.py": 2,
    "miniplm_udf/report/queries.py": 2,
    "miniplm_udf/scoring/description.py": 2,
    "miniplm_udf/store/corpus_records.py": 2,
    "miniplm_udf/store/model_records.py": 1,
    "miniplm_udf/store/pins.py": 1,
    "miniplm_udf/store/provenance.py": 6,
    "miniplm_udf/streams/status.py": 1,
    "miniplm_udf/workers/process_slots.py": 1,
    "trainer/checkpoints/checkpoint.py": 4,
    "trainer/models/teacher_loading.py": 1,
    # Printed, or sent to MLflow.
    "jobs/demo_text.py": 1,
    "jobs/records.py": 1,
    "jobs/stage.py": 1,
    "jobs/stage_inputs.py": 1,
    "trainer/__main__.py": 2,
    "trainer/evaluation/records.py": 1,
    "trainer/evaluation/run.py": 2,
    "trainer/records.py": 1,
    "trainer/scaling/command.py": 4,
    "trainer/tracking/callbacks.py": 4,
    "trainer/tracking/run.py": 7,
    "trainer/train.py": 5,
}


def json_uses(source: str) -> int:
    """How often code uses the name `Json`, in quoted types too, except where it is imported or declared."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quoted = [text for text in texts if "\n" not in text and re.search(r"\bJson\b", text)]
    return sum(node.id == "Json" for node in names) + len(quoted)


def test_every_use_of_json_without_declared_keys_has_a_reason() -> None:
    uses = {path: json_uses(source) for path, source in sources(*PACKAGES).items()}
    assert {path: n for path, n in uses.items() if n > JSON_USES.get(path, 0)} == {}
    assert json_uses('from a import Json\nx: Json = {}\ndef f(y: "list[Json]") -> Json: ...') == 3
