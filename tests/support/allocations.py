"""Measures the largest memory that torch holds while a piece of work runs, on a CPU or a GPU.

Input: a function without arguments. Output: bytes above what was held before. On a CPU torch's profiler records every
allocation; memory that torch does not allocate itself does not count. On a GPU the allocator keeps the peak.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The largest number of bytes held while the work runs, above the bytes held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = largest = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        largest = max(largest, held)
    return largest
