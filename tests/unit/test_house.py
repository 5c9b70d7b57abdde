"""Where things stand: imports of the tests, the import contract, names of classes, places under a root; and how they
are described: arguments and results of public functions, dicts with undeclared keys.

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
PLACES = ("tables", "_checkpoints", "models", "_leases", "_status", "_stages")
TABLE_FOLDERS = ("refined", "cuts", "pinned", "packed")
_FOLDER = f"(?:{'|'.join((*PLACES, *TABLE_FOLDERS, 'proxy', 'exports'))})"
# `tables/` or `/tables`, but not `<root>/tables`, `ROOT/exports` or `refined/<name>`.
PLACE_IN_PATH = re.compile(rf"(?<![\w.>/]){_FOLDER}/(?!<)|(?<!ROOT)(?<!<root>)/{_FOLDER}(?![\w.])(?!/<)")


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


def helpers_outside_support(files: dict[str, str]) -> list[str]:
    """Files of the tests outside `tests/support` that are neither a test nor a program.

    A program (a benchmark, the fault trials) stands next to its tests: its docstring has its command, and it runs.
    """
    helpers = []
    for path in map(Path, files):
        command = f"python -m {'.'.join(path.with_suffix('').parts)}"
        is_program = command in (ast.get_docstring(ast.parse(files[str(path)])) or "")
        is_program = is_program and '\nif __name__ == "__main__":\n' in files[str(path)]
        is_test = path.name.startswith("test_") or path.name in ("__init__.py", "conftest.py")
        if path.parts[1] != "support" and not is_test and not is_program:
            helpers.append(str(path))
    return helpers


def test_helpers_live_in_support() -> None:
    assert helpers_outside_support(sources("tests")) == []
    runs = '\nif __name__ == "__main__":\n    main()'
    files = {
        "tests/bench/a.py": f'"""Measures: `python -m tests.bench.a`."""{runs}',
        "tests/support/b.py": "",
        "tests/unit/test_c.py": "",
    }
    mistakes = {"tests/bench/d.py": f'"""Loops."""{runs}', "tests/bench/e.py": '"""`python -m tests.bench.e`."""'}
    assert helpers_outside_support({**files, **mistakes}) == list(mistakes)


# A room of so few modules needs no contract of its own: its place among the other rooms is enough.
TINY_ROOM = 3


def modules_by_room(paths: Iterable[str]) -> dict[str, set[str]]:
    """Names of the modules and rooms directly in each package, by the package's dotted name."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for path in map(Path, paths):
        parts = path.with_suffix("").parts
        for depth in range(1, len(parts)):
            if parts[depth] != "__init__":
                rooms[".".join(parts[:depth])].add(parts[depth])
    return rooms


def modules_without_contract(rooms: dict[str, set[str]], layers_by_room: dict[str, str]) -> list[str]:
    """Modules that no contract of their room names, except those of a tiny room, by dotted name.

    Args:
        rooms: names of modules by room.
        layers_by_room: the layers of the exhaustive contract of a room.
    """
    missing = []
    for room, names in rooms.items():
        named = {name.strip() for line in layers_by_room.get(room, "").splitlines() for name in line.split("|")}
        if room in layers_by_room or room in PACKAGES or len(names) > TINY_ROOM:
            missing += [f"{room}.{name}" for name in sorted(names - named)]
    return missing


def test_every_module_stands_in_an_import_contract() -> None:
    """In a contract whose layers are exhaustive: otherwise import-linter passes over a module without a layer."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    contracts = [dict(section) for name, section in setup.items() if name.startswith("importlinter:contract:")]
    layers_by_room = {
        room: contract["layers"]
        for contract in contracts
        if contract["type"] == "layers" and contract.get("exhaustive") == "true"
        for room in contract["containers"].split()
    }
    assert modules_without_contract(modules_by_room(sources(*PACKAGES)), layers_by_room) == []
    assert setup["importlinter"]["root_packages"].split() == list(PACKAGES)
    # Files outside the packages would stand in no contract.
    folders = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    # `docs` is not installed and no package imports it: `python -m docs.site` builds the site.
    assert folders == {*PACKAGES, "tests", "docs"}
    assert [
        path
        for path, source in sources(*PACKAGES).items()
        if any(name.split(".")[0] == "docs" for name in imported_modules(source))
    ] == []


def test_a_module_without_a_contract_is_seen() -> None:
    files = ["jobs/__init__.py", "jobs/a.py", "jobs/b.py", "jobs/small/a.py", "jobs/big/__init__.py"]
    files += [f"jobs/big/{name}.py" for name in "abcd"]
    rooms = modules_by_room(files)
    jobs = "a\nsmall | big"
    assert modules_without_contract(rooms, {"jobs": jobs, "jobs.big": "a | b\nc"}) == ["jobs.b", "jobs.big.d"]
    assert modules_without_contract(rooms, {"jobs": f"{jobs} | b"}) == [f"jobs.big.{name}" for name in "abcd"]
    assert modules_without_contract({"jobs": {"a"}}, {}) == ["jobs.a"]


def class_names(source: str) -> Iterator[str]:
    """Names of the classes of a file, at its top or inside functions, and of its types at the top, without underscores.

    A type at the top is a name in CapitalWords that a value is assigned to, as in `Rows = list[dict[str, int]]`.
    """
    tree = ast.parse(source)
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names += [target.id for target in targets if isinstance(target, ast.Name) and not target.id.isupper()]
    yield from (name.lstrip("_") for name in names if name.lstrip("_")[:1].isupper())


def shared_class_names(files: dict[str, str]) -> dict[str, list[str]]:
    """Names of classes and types that occur more than once, with their files."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in files.items():
        for name in class_names(source):
            places[name].append(path)
    return {name: paths for name, paths in places.items() if len(paths) > 1}


def test_no_two_classes_share_a_name() -> None:
    """Tests may give a fake the name of the class that it stands for, but no two tests the same name."""
    assert shared_class_names(sources(*PACKAGES)) == {}
    assert shared_class_names(sources("tests")) == {}
    mistakes = {
        "a.py": "class Run: ...\nRows = dict[str, int]\nLIMIT = 1",
        "b.py": "class _Run: ...\ndef f():\n    class Rows: ...\nLIMIT = 2",
    }
    assert shared_class_names(mistakes) == {"Run": ["a.py", "b.py"], "Rows": ["a.py", "b.py"]}


def texts(source: str) -> Iterator[tuple[ast.Constant, ast.AST | None]]:
    """String literals that are no docstring, parts of f-strings too, with the node around each."""
    tree = ast.parse(source)
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and not isinstance(around[node], ast.Expr):
            yield node, around[node]


def spelled_places(source: str) -> Iterator[str]:
    """String literals with a path below a root, or with the name of a place by itself, whatever they are used for.

    Two things are not meant: a placeholder for a reader (`<root>/models`, `refined/<name>`), and a key of a dict, which
    stands in the dict or is given to it as an index or with `get` or `pop`.
    """
    for node, around in texts(source):
        text = str(node.value)
        is_key = isinstance(around, ast.Subscript) or (isinstance(around, ast.Dict) and node in around.keys)
        if isinstance(around, ast.Call) and isinstance(around.func, ast.Attribute):
            is_key = is_key or around.func.attr in ("get", "pop")
            if around.func.attr == "table" and text in TABLE_FOLDERS:
                yield f"line {node.lineno}: {text!r}"
        if PLACE_IN_PATH.search(text) or (text in PLACES and not is_key):
            yield f"line {node.lineno}: {text!r}"


def test_only_the_layout_spells_places_under_a_root() -> None:
    """`layout.py` makes the paths and takes them apart, `table_names.py` the names of tables in folders."""
    owners = ("miniplm_udf/layout.py", "miniplm_udf/schemas/table_names.py")
    files = {path: source for path, source in sources(*PACKAGES).items() if path not in owners}
    spelled = {path: list(spelled_places(source)) for path, source in files.items()}
    assert {path: lines for path, lines in spelled.items() if lines} == {}


@pytest.mark.parametrize(
    "mistake",
    [
        'storage.join(root, "tables", name)',
        'f"{root}/_checkpoints/score"',
        'root / "models"',
        'root + "/tables/scores"',
        'parts = ("tables", name)\nuri = "/".join([root, *parts])',
        'for part in ["_stages", "_leases"][:1]: uri = f"{root}/{part}"',
        'name.startswith("refined/")',
        'f"packed/{corpus}"',
        'layout.table("cuts", name)',
        'message = "the record tables/instances.json"',
    ],
)
def test_a_place_is_seen(mistake: str) -> None:
    assert len(list(spelled_places(mistake))) in (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        '"""Reads tables/scores."""',
        'help = "writes <root>/models/NAME and refined/<name>"',
        'config["models"], config.pop("models"), {"tables": 1}',
        'mode = "packed"',
        'f"models.{alias}: no such model"',
    ],
)
def test_a_text_or_a_key_is_no_place(text: str) -> None:
    assert list(spelled_places(text)) == []


# Arguments that need no description: `self`, and arguments whose type says all: the session and the experiment.
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
    """Arguments of a function, except `self`, `cls`, `*more`, `**more` and arguments of a type in UNDESCRIBED."""
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


def functions_without_result(files: dict[str, str]) -> list[str]:
    """Public functions whose docstring lists Args but does not tell what is returned.

    It tells with a section Returns or Yields, or in its first line. A context manager returns nothing to its caller.
    """
    missing = []
    for path, source in files.items():
        for name, function in public_functions(source):
            text = ast.get_docstring(function) or ""
            result = "None" if function.returns is None else ast.unparse(function.returns)
            is_context = any("contextmanager" in ast.unparse(decorator) for decorator in function.decorator_list)
            if "Args:\n" not in text or result == "None" or is_context:
                continue
            is_told = re.match(r"(Yields|Whether|The)\b|.*\b[Rr]eturns\b", text) is not None
            if not is_told and not re.search(r"^(Returns|Yields):$", text, re.MULTILINE):
                missing.append(f"{path}: {name}")
    return missing


def test_public_functions_tell_what_they_return() -> None:
    assert functions_without_result(sources(*PACKAGES)) == []


@pytest.mark.parametrize(
    ("summary", "more", "result", "functions"),
    [
        ("Adds.", "", "int", ["f"]),
        ("Adds.", "", "None", []),
        ("Adds.", "\n    Returns:\n        The sum.\n", "int", []),
        ("Adds.", "\n    Raises:\n        ValueError: it is odd.\n", "int", ["f"]),
        ("Returns the sum.", "", "int", []),
        ("Adds, and returns the sum.", "", "int", []),
        ("Whether it is even.", "", "bool", []),
        ("The sum.", "", "int", []),
    ],
)
def test_a_result_without_a_word_is_seen(summary: str, more: str, result: str, functions: list[str]) -> None:
    source = f'def f(a: int) -> {result}:\n    """{summary}\n\n    Args:\n        a: a number.\n{more}    """'
    assert functions_without_result({"a.py": source}) == [f"a.py: {name}" for name in functions]


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
    "miniplm_udf/config/collecting.py": 10,
    "miniplm_udf/config/experiment.py": 2,
    "miniplm_udf/config/generate.py": 1,
    "miniplm_udf/config/overrides.py": 1,
    "miniplm_udf/config/rules.py": 1,
    "miniplm_udf/config/student_models.py": 3,
    "miniplm_udf/config/targets.py": 1,
    "miniplm_udf/config/training.py": 2,
    "miniplm_udf/estimate/measure.py": 1,
    "miniplm_udf/ingestion/beginnings.py": 8,
    "miniplm_udf/ingestion/documents.py": 5,
    "miniplm_udf/object_storage.py": 2,
    "miniplm_udf/scoring/batching.py": 1,
    "miniplm_udf/scoring/gguf_facts.py": 12,
    "miniplm_udf/scoring/gguf_header.py": 1,
    "miniplm_udf/scoring/gguf_models.py": 3,
    "miniplm_udf/scoring/prefix.py": 2,
    "miniplm_udf/scoring/separators.py": 1,
    "miniplm_udf/scoring/tokenizer.py": 3,
    "miniplm_udf/starting/fields.py": 2,
    "miniplm_udf/starting/teacher.py": 5,
    "miniplm_udf/starting/texts.py": 1,
    "miniplm_udf/upkeep/architectures.py": 6,
    "miniplm_udf/upkeep/expression_checks.py": 1,
    "miniplm_udf/upkeep/input_checks.py": 4,
    "miniplm_udf/upkeep/model_checks.py": 2,
    "miniplm_udf/upkeep/training_checks.py": 2,
    "trainer/losses/lm_loss.py": 1,
    "trainer/models/model.py": 2,
    "trainer/ranks/state.py": 1,
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
    "miniplm_udf/explorer/candidates.py": 1,
    "miniplm_udf/ingestion/query.py": 2,
    "miniplm_udf/packing/corpus.py": 1,
    "miniplm_udf/refinement/refine.py": 2,
    "miniplm_udf/report/comparison.py": 1,
    "miniplm_udf/report/queries.py": 2,
    "miniplm_udf/scores/models.py": 1,
    "miniplm_udf/scoring/description.py": 3,
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
    "jobs/stage_inputs.py": 3,
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
