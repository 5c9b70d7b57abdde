"""The paper's models by name: `student_files/*.yaml` (in a clone also `conf/students`), one file per model.

    title, parameters, source, architecture (keywords of AutoConfig), train (keys of the recipe), notes

Input: an experiment as read from YAML, in which students and the reference may name a `model`. Output: the same with
every key of `architecture` and `train` that is not set filled in from the model's file. The files are part of the
package, so a wheel has them. Imports nothing heavy.
"""

import dataclasses
import difflib
import functools
import importlib.resources

from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentModel:
    """One model with its recipe.

    Attributes:
        title: one line about the model.
        parameters: number of weights; tied weights count once.
        source: the paper, and where it says so.
        architecture: keywords of transformers' `AutoConfig`, with `model_type`, `vocab_size` and every size.
        train: keys of the section `train` in which the paper's recipe differs from the defaults.
        notes: remarks for people.
    """

    title: str
    parameters: int
    source: str
    architecture: Json
    train: Json = dataclasses.field(default_factory=dict)
    notes: str | None = None


@functools.cache
def load_student_models() -> dict[str, StudentModel]:
    """All models by name, read once in a process."""
    import yaml

    folder = importlib.resources.files("miniplm_udf.config") / "student_files"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): StudentModel(**yaml.safe_load(file.read_text("utf-8"))) for file in files}


def fill_in(raw: Json) -> None:
    """Fills in `architecture` and `train` of the students and the reference, in place.

    For each key, the value comes from the first of these that sets it: the student itself, the experiment's section
    `train`, the named model; otherwise it is the default.

    Args:
        raw: the mapping of the experiment file, with known keys only.

    Raises:
        ConfigError: there is no model of that name, or a student has neither a model nor an architecture.
    """
    shared = raw.get("train") or {}
    sections = {f"students.{name}": section for name, section in (raw.get("students") or {}).items()}
    if raw.get("reference"):
        sections["reference"] = raw["reference"]
    for place, section in sections.items():
        if not isinstance(section, dict):
            continue
        model = _named(place, section.get("model"))
        if model is None and "architecture" not in section and place != "reference":
            names = ", ".join(load_student_models())
            raise ConfigError(f"{place}: expected a model ({names}) or an architecture, found neither")
        section["train"] = {**(model.train if model else {}), **shared, **(section.get("train") or {})}
        if model is not None:
            section["architecture"] = {**model.architecture, **(section.get("architecture") or {})}


def _named(place: str, name: str | None) -> StudentModel | None:
    """The model of a section's key `model`; None for null."""
    if name is None:
        return None
    models = load_student_models()
    if name not in models:
        close = difflib.get_close_matches(str(name), list(models), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; describe other models under `architecture`"
        raise ConfigError(f"{place}.model: expected one of {', '.join(models)}, found {name!r}{hint}")
    return models[name]
