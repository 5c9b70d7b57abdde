"""Scores texts with llama.cpp, in its own environment: `python engine_llama_cpp.py MODEL.gguf TEXTS.json RESULTS.json`.

TEXTS.json and RESULTS.json as in engine_vllm.py. A file of quantised weights is first written as float32, so that all
engines have the same weights. Texts share batches, sorted by length, as llama.cpp's own server does it. Imports nothing
of this project, which that environment lacks.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

# Tokens of one llama_decode; the best of 256 to 2,048 on two cores.
_BATCH_TOKENS = 512


def as_float32(gguf: str, folder: Path) -> str:
    import llama_cpp

    target = folder / "float32.gguf"
    if not target.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        if llama_cpp.llama_model_quantize(gguf.encode(), str(target).encode(), ctypes.byref(settings)) != 0:
            raise RuntimeError(f"{gguf} cannot be written as float32")
    return str(target)


def main(gguf: str, texts: str, results: str) -> None:
    import llama_cpp
    import numpy as np

    sets = json.loads(Path(texts).read_text())
    longest = max(len(ids) for each in sets.values() for ids in each)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        as_float32(gguf, Path(results).parent).encode(), llama_cpp.llama_model_default_params()
    )
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    settings = llama_cpp.llama_context_default_params()
    size = max(_BATCH_TOKENS, longest)
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 2 * size, size, _BATCH_TOKENS, 64
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    settings.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(size, 0, 1)

    def together(rows: list[list[int]]) -> list[float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        place = 0
        for sequence, ids in enumerate(rows):
            for position, token in enumerate(ids):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, sequence, True
                place += 1
        batch.n_tokens = place
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (place, n_vocab))
        sums, start = [], 0
        for ids in rows:
            own = logits[start : start + len(ids) - 1]
            top = own.max(axis=1)
            total = top + np.log(np.exp(own - top[:, None]).sum(axis=1))
            sums.append(float((total - own[np.arange(len(own)), ids[1:]]).sum(dtype=np.float64)))
            start += len(ids)
        return sums

    def nats(each: list[list[int]]) -> list[float]:
        found = [0.0] * len(each)
        chosen: list[int] = []
        for number in sorted(range(len(each)), key=lambda number: -len(each[number])):
            if chosen and (sum(len(each[n]) for n in chosen) + len(each[number]) > size or len(chosen) == 64):
                for n, value in zip(chosen, together([each[n] for n in chosen]), strict=True):
                    found[n] = value
                chosen = []
            chosen.append(number)
        for n, value in zip(chosen, together([each[n] for n in chosen]), strict=True):
            found[n] = value
        return found

    measured = {}
    for name, each in sets.items():
        nats(each[:2])
        start = time.perf_counter()
        sums = nats(each)
        measured[name] = {"seconds": time.perf_counter() - start, "nats": sums}
    Path(results).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
