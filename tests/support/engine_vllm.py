"""Scores texts with vLLM, in its own environment: `python engine_vllm.py MODEL_FOLDER TEXTS.json RESULTS.json`.

TEXTS.json: {name: list of texts as token ids}. RESULTS.json: {name: {"seconds": ..., "nats": sum of each text}}.
Imports nothing of this project, which that environment lacks.
"""

import json
import sys
import time
from pathlib import Path


def main(model: str, texts: str, results: str) -> None:
    from vllm import LLM, SamplingParams

    sets = json.loads(Path(texts).read_text())
    longest = max(len(ids) for each in sets.values() for ids in each)
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=longest + 1, enable_prefix_caching=False
    )
    # The log probability of each token of the prompt and of no other.
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def nats(each: list[list[int]]) -> list[float]:
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in each], sampling, use_tqdm=False)
        return [
            -sum(found[token].logprob for found, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True))
            for output, ids in zip(outputs, each, strict=True)
        ]

    found = {}
    for name, each in sets.items():
        nats(each[:2])
        start = time.perf_counter()
        sums = nats(each)
        found[name] = {"seconds": time.perf_counter() - start, "nats": sums}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
