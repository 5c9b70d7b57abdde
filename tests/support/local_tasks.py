"""Tiny local copies of the paper's nine tasks: lm-eval's own definitions, with a few questions of our own as data."""

import importlib.util
import json
from pathlib import Path
from typing import Any

# Task -> the file of its definition in lm_eval/tasks, the split that is evaluated, and one question.
_CHOICES = {"text": ["the sun", "the moon", "a lamp", "a stone"], "label": ["A", "B", "C", "D"]}
_STORY = {f"input_sentence_{i}": f"Sentence {i} of a story." for i in range(1, 5)}
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "validation",
        {"activity_label": "Walking", "ctx_a": "A man walks.", "ctx_b": "then he", "label": "1",
         "endings": ["sits on a green river.", "walks on.", "sings [laughs].", "is a stone."]},
    ),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test", {"text": "the green river walks and the green river"}),
    "winogrande": (
        "winogrande/default.yaml",
        "validation",
        {"sentence": "The stone hit the tea because _ was heavy.", "option1": "stone", "option2": "tea", "answer": "1"},
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "test",
        {"question_stem": "What lights the day?", "choices": _CHOICES, "answerKey": "A"},
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "test",
        {"question": "What lights the night?", "choices": _CHOICES, "answerKey": "B"},
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        "test",
        {"question": "What lights a room?", "choices": _CHOICES, "answerKey": "C"},
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "validation",
        {"goal": "make tea", "sol1": "boil water", "sol2": "boil a stone", "label": 0},
    ),
    "social_iqa": (
        "siqa/siqa.yaml",
        "validation",
        {"context": "Kai made tea.", "question": "How does Kai feel?", "answerA": "warm", "answerB": "green",
         "answerC": "a river", "label": "1"},
    ),
    "storycloze_2016": (
        "storycloze/storycloze_2016.yaml",
        "test",
        {**_STORY, "sentence_quiz1": "It ended.", "sentence_quiz2": "A stone and.", "answer_right_ending": 1},
    ),
}  # fmt: skip


def write_tasks(folder: Path, n_questions: int = 4) -> Path:
    """A folder for `evaluate.tasks_folder`: a YAML file for each of the nine tasks, and its questions next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    definitions = Path(spec.origin).parent / "tasks"
    for name, (file, split, question) in TASKS.items():
        lines = [json.dumps(question, ensure_ascii=False) for _ in range(n_questions)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        splits = {f"{each}_split": each if each == split else None for each in ("training", "validation", "test")}
        task = {
            **splits,
            "include": str(definitions / file),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
        }
        task["dataset_kwargs"] = {"data_files": {split: f"{name}.jsonl"}}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder
