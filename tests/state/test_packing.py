"""The bytes are the library's own, and a process that packs tensors of ever new lengths keeps nothing of them."""

from __future__ import annotations

import ctypes

import pytest
import safetensors
import safetensors.torch
import torch

from linstate.state.packing import packed


def test_the_bytes_are_those_of_the_library() -> None:
    tensors = {
        "wide": torch.randn(3, 4),
        "turned": torch.randn(3, 4).T,
        "narrow": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 1, 3).double(),
        "whole": torch.arange(3),
        "codes": torch.arange(-3, 4).to(torch.int8),
        "none": torch.zeros(1, 0, 4),
        "one": torch.tensor(2.5),
        "bits": torch.tensor([True, False]),
    }
    for metadata in (None, {"dtypes": "{}"}):
        plain = {name: t.contiguous() for name, t in tensors.items()}
        blob = packed(tensors, metadata)
        assert blob == safetensors.torch.save(plain, metadata)
        back = safetensors.torch.load(blob)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], t) for name, t in tensors.items())


@pytest.mark.skipif(not hasattr(safetensors, "TensorSpec"), reason="this safetensors has no other way")
def test_no_type_is_left_of_a_length() -> None:
    types = ctypes._pointer_type_cache  # type: ignore[attr-defined]
    before = len(types)
    for length in range(90_001, 90_051):
        packed({"x": torch.zeros(length, dtype=torch.uint8)})
    assert len(types) == before
