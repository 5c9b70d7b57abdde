"""The peak of a GPU's matrix products in FLOP/s, which scoring and training compare their model FLOPs with.

Owns the one table of peaks. Input: the name that CUDA reports, and a dtype; output: FLOP/s, or None for a GPU that the
table does not have. Executor side and in the trainer; pure.

Source: the data sheets and architecture papers of NVIDIA. float8 and bfloat16: dense products that accumulate in
float32. float32: products without TF32, which torch does not use unless it is told to; this project does not tell it.
"""

import re

import torch

_DTYPES = ("float8", "bfloat16", "float32")
# TFLOP/s in the dtypes above, by words of the name; None for products that the chip does not have. The first row whose
# words stand in the name counts, so a variant stands above its family.
_PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
    ("GB200", 5000.0, 2500.0, 80.0),
    ("B200", 4500.0, 2250.0, 75.0),
    ("GH200", 1979.0, 989.0, 67.0),
    ("H200 NVL", 1671.0, 835.0, 60.0),
    ("H200", 1979.0, 989.0, 67.0),
    ("H100 PCIe", 1513.0, 756.0, 51.0),
    ("H100 NVL", 1671.0, 835.0, 60.0),
    ("H100", 1979.0, 989.0, 67.0),
    ("A100", None, 312.0, 19.5),
    ("A40", None, 149.7, 37.4),
    ("A30", None, 165.0, 10.3),
    ("A10", None, 125.0, 31.2),
    ("L40S", 733.0, 362.0, 91.6),
    ("L40", 362.0, 181.0, 90.5),
    ("L4", 242.5, 121.0, 30.3),
    ("GeForce RTX 4090$", 330.3, 165.2, 82.6),
    ("GeForce RTX 3090$", None, 71.0, 35.6),
    ("V100-SXM2", None, None, 15.7),
    ("V100-PCIE", None, None, 14.0),
    ("T4", None, None, 8.1),
)


def peak_flops_per_second(device: torch.device, dtype: str) -> float | None:
    """Returns the peak of a chip, or None if it is not known.

    Args:
        device: where the products run.
        dtype: dtype of the products: float8, bfloat16 or float32; others are not known.
    """
    return None if device.type != "cuda" else peak_of_gpu(torch.cuda.get_device_name(device), dtype)


def peak_of_gpu(name: str, dtype: str) -> float | None:
    """Returns the peak of a GPU in FLOP/s, or None if it is not known, or if the name is one of a part of a GPU (MIG).

    Args:
        name: the name that CUDA reports.
        dtype: see `peak_flops_per_second`.
    """
    if dtype not in _DTYPES or re.search(r"\bMIG\b", name):
        return None
    peaks = next((peaks for words, *peaks in _PEAKS if re.search(rf"\b{words}(?!\w)", name)), None)
    peak = None if peaks is None else peaks[_DTYPES.index(dtype)]
    return None if peak is None else peak * 1e12
