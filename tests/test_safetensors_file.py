"""Weights written tensor by tensor are the bytes that the safetensors package writes."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import save

from lsgm.safetensors_file import write_safetensors


def test_the_same_bytes():
    torch.manual_seed(0)
    state = {
        "b.weight": torch.randn(3, 5).T,
        "a": torch.randn(()),
        "half": torch.randn(4).half(),
        "brain": torch.randn(3).bfloat16(),
        "ä": torch.randn(2).double(),
        "flags": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 3),
    }
    file = io.BytesIO()
    write_safetensors(file, state)
    assert file.getvalue() == save({name: value.contiguous() for name, value in state.items()})


def test_types_without_a_place():
    with pytest.raises(ValueError, match="c: torch.complex64"):
        write_safetensors(io.BytesIO(), {"c": torch.zeros(2, dtype=torch.complex64)})
