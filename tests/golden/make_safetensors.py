"""Writes safetensors_reference.safetensors with the format's own package: what io/safetensors.h must read, and
must write byte for byte (tests/test_safetensors.c holds the same values).

    pip install torch safetensors; python tests/golden/make_safetensors.py
"""

import os

import torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIAL = [0.0, -0.0, 1.0, -2.5, 65504.0, 2.0**-14, 2.0**-24, -(2.0**-24) * 1023, float("inf"), float("nan")]

ramp = torch.arange(-6, 6, dtype=torch.float64) / 8
tensors = {
    "matrix": ramp.reshape(3, 4).float(),
    "another.weight": (ramp * 3).reshape(2, 1, 6).float(),
    "scalar": torch.tensor(3.5, dtype=torch.float32),
    "empty": torch.zeros(0, 5, dtype=torch.float32),
    "double": ramp / 3,
    "half": torch.tensor(SPECIAL, dtype=torch.float16),
    "brain": torch.tensor(SPECIAL, dtype=torch.bfloat16),
    "counters": torch.tensor([-1, 2**62], dtype=torch.int64),
    "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "flags": torch.tensor([True, False]),
    'quoted "\\ \n ü': torch.tensor([7.0], dtype=torch.float32),
}
save_file(tensors, os.path.join(HERE, "safetensors_reference.safetensors"), metadata={"format": "pt"})
