"""The way of a read: how many functions in how many files stand between a person's call and the kernel that updates a state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from linstate import Decoder, LanguageModel, ModelConfig
from linstate.ops import dispatch, native
from small_models import tokenizer

MOST = {"chunked": (9, 6), "step": (10, 7)}
"""Functions and files of Linstate by form: the call, the reader (or the generation), the decoder, its block, the mixer, the op, the kernel."""


@pytest.mark.skipif(not native.available, reason="no native kernels")
@pytest.mark.parametrize("form", ["step", "chunked"])
def test_from_a_persons_call_to_the_kernel(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(vocab_size=300, d_model=64, pattern=("gated_deltanet",), feed_forward="none")
    model = LanguageModel(Decoder(config).eval(), tokenizer(), name="path", grid=16)
    ways: list[list[tuple[str, str]]] = []
    kernel = dispatch.TABLE["fused", form, "native"]

    def run(*arguments: Any) -> Any:
        way, frame = [], sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if "linstate" in file.parts and "tests" not in file.parts:
                way.append(
                    (file.name if file.name != "__init__.py" else file.parent.name, frame.f_code.co_name)
                )
            frame = frame.f_back
        ways.append(way[::-1])
        return kernel.run(*arguments)

    monkeypatch.setitem(
        dispatch.TABLE, ("fused", form, "native"), type(kernel)(**{**vars(kernel), "run": run})
    )
    torch.manual_seed(0)
    if form == "chunked":
        model.append(range(40))
    else:
        next(model.stream(model.append(range(3)), max_tokens=2))
        list(model.stream(model.append(range(3)), max_tokens=2))
    way = ways[-1]
    functions = [*way, (f"native/{kernel.run.__module__}", kernel.run.__name__)]
    most_functions, most_files = MOST[form]
    assert len(functions) <= most_functions, functions
    assert len({file for file, _ in functions}) <= most_files, functions
    assert way[-1][1] == "fused"  # nothing between the op and its kernel
