"""Writing of safetensors files tensor by tensor, so that weights that lie in a file need no second
copy in memory; the bytes are those that the safetensors package writes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO

import torch
from torch import Tensor

__all__ = ["write_safetensors"]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


def write_safetensors(file: IO[bytes], state: Mapping[str, Tensor]) -> None:
    """Write ``state`` to a binary file.

    Raises:
        ValueError: A tensor's type has no place in the format.
    """
    for name, value in state.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"{name}: {value.dtype} cannot be written as safetensors")
    # Wide types first, which keeps every tensor aligned.
    ordered = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header, offset = {}, 0
    for name in ordered:
        value = state[name]
        end = offset + value.numel() * value.element_size()
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in ordered:
        flat = state[name].detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)
