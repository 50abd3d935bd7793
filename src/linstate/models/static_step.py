"""One decoded token through a packed model in static buffers: a handful of native calls instead of a thousand of torch's.

A model's half layers, ``x += mixer(norm(x))`` and ``x += feed_forward(norm(x))``, are run once while their native calls are
recorded (``ops/native/program.py``). Neighbours that are nothing but native calls become one program, from embedding to head
where all are; the others are called as always, in between. So every mixer that has a native step gains, and none needs to
know. Before it serves, the whole is held against the model itself, on the token that it was recorded with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linstate.errors import StateMismatchError
from linstate.ops.native.program import Program, Recording
from linstate.types import LayerState, by_layer, prefixed, under

if TYPE_CHECKING:
    from linstate.models.decoder import Block, Decoder

MOST_ROWS = 16
"""Rows of a batch up to which there are static buffers."""


class StaticStep:
    """Single tokens of one decoder. Call it as :meth:`__call__`; it answers None where the model itself has to serve."""

    def __init__(self) -> None:
        self._steps: dict[int, _Step | None] = {}
        self._busy = threading.Lock()

    def __deepcopy__(self, memo: Any) -> StaticStep:
        return StaticStep()  # buffers are not shared

    def __call__(
        self, decoder: Decoder, tokens: Tensor, state: LayerState, logits: bool
    ) -> tuple[Tensor, LayerState] | None:
        """Logits ``[B, 1, vocab]`` (empty without ``logits``) and the state after ``tokens [B, 1]``.

        None if the model has what cannot be recorded at all, gradients are wanted, or another thread is in the buffers.
        """
        rows = tokens.shape[0]
        if torch.is_grad_enabled() or not 0 < rows <= MOST_ROWS or not self._busy.acquire(blocking=False):
            return None
        try:
            if rows not in self._steps:
                self._steps[rows] = _Step(decoder, rows) if recordable(decoder) else None
            step = self._steps[rows]
            return None if step is None else step(tokens, state, logits)
        finally:
            self._busy.release()


def recordable(decoder: Decoder) -> bool:
    """Whether a decoder's layers are what :class:`_Step` knows: bf16, norm before each branch, plain sums."""
    config = decoder.config
    plain = not config.norm_place and not config.residual_scales
    return (
        plain
        and config.logit_scale == 1.0
        and decoder.shared_blocks is None
        and decoder.embedding.weight.dtype is torch.bfloat16
        and decoder.embedding.weight.is_cpu
    )


Half = Callable[[Tensor, LayerState, dict[str, Tensor]], tuple[Tensor, LayerState]]


def _halves(decoder: Decoder) -> list[tuple[str, Half]]:
    """The branches of all layers in order, with the prefix of their states' names."""

    def mixing(block: Block) -> Half:
        def half(x: Tensor, state: LayerState, shared: dict[str, Tensor]) -> tuple[Tensor, LayerState]:
            assert block.mixer is not None
            return block.mixer(block.mixer_norm(x), state, shared=shared)

        return half

    def feeding(block: Block) -> Half:
        def half(x: Tensor, state: LayerState, shared: dict[str, Tensor]) -> tuple[Tensor, LayerState]:
            assert block.ff is not None
            return block.ff(block.ff_norm(x), state)

        return half

    halves: list[tuple[str, Half]] = []
    for i, block in enumerate(decoder.blocks()):
        if block.mixer is not None:
            halves.append((f"layers.{i}.mixer", mixing(block)))
        if block.ff is not None:
            halves.append((f"layers.{i}.ff", feeding(block)))
    return halves


class _Step:
    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder, self.wide = decoder, decoder.config.residual_in_fp32
        # In inference mode a recording would see conversions that convert nothing, and nothing would be whole.
        with torch.inference_mode(False), torch.no_grad():
            self._record(rows)

    def _record(self, rows: int) -> None:
        decoder = self.decoder
        token = self.tokens = torch.zeros(rows, 1, dtype=torch.int64)
        begin = decoder.init_state(rows)
        self.parts: list[Program | tuple[str, Half]] = []
        with Recording() as recording:
            self.into = decoder.embed(self.tokens)
        """What a branch reads."""
        self.x = self.into.float() if self.wide else self.into
        """The residual stream."""
        x = self.x.clone()
        program = Program()
        self.embeds = program.append(recording, {}, {})
        """Whether a program begins with the embedding."""
        if self.embeds:
            self.parts.append(program)
            if self.wide:
                program.add(self.x, self.into, self.into, fresh=True)
        # What layers hand to later ones. Recorded layers read it where it stands: a weight, or what a recorded layer writes
        # anew each time. Behind a layer that is called and hands something on, none is recorded.
        self.shared: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        stands = True
        layers = by_layer(begin)
        for prefix, half in _halves(decoder):
            number, name = prefix.split(".")[1:]
            before = under(name, layers.get(int(number), {}))
            self.into.copy_(x)
            handed = dict(shared)
            with Recording() as recording:
                y, after = half(self.into, before, shared)
            last = self.parts[-1] if self.parts else None
            program = last if isinstance(last, Program) else Program()
            names = prefixed(prefix, before), prefixed(prefix, after)
            new = [t for name, t in shared.items() if handed.get(name) is not t]
            if not (stands and y.is_contiguous() and program.append(recording, *names)):
                self.parts.append((prefix, half))
                stands = stands and all(isinstance(t, torch.nn.Parameter) for t in new)
                x = x + y
                continue
            self.shared = dict(shared)
            program.add(self.x, y, self.into if self.wide else None)
            if program is not last:
                self.parts.append(program)
            x = x + y
        self.into.copy_(x)
        with Recording() as recording:
            self.logits = decoder.logits_of(decoder.norm(self.into))
        last = self.parts[-1] if self.parts else None
        program = last if isinstance(last, Program) else Program()
        self.body = program.length
        """Calls of the last program without the head."""
        self.recorded_head = program.append(recording, {}, {})
        if self.recorded_head and program is not last:
            self.parts.append(program)
        self._check(token, begin)

    def _check(self, token: Tensor, begin: LayerState) -> None:
        """Two tokens by both ways."""
        decoder, kept = self.decoder, self.decoder.step
        mine, other = begin, begin
        for _ in range(2):
            found, mine = self(token, mine, True)
            decoder.step = None
            try:
                expected, other = decoder(token, other)
            finally:
                decoder.step = kept
            same = torch.equal(found, expected) and all(
                torch.equal(t, other[name]) for name, t in mine.items()
            )
            if not same:
                raise StateMismatchError("a recorded step differs from the model that it was recorded from")

    def __call__(self, tokens: Tensor, state: LayerState, logits: bool) -> tuple[Tensor, LayerState]:
        if self.embeds:
            self.tokens.copy_(tokens)
        else:
            self.x.copy_(self.decoder.embed(tokens))
            if self.wide:
                self.into.copy_(self.x)
        threads = torch.get_num_threads()
        after: LayerState = {}
        shared = dict(self.shared)
        layers: dict[int, LayerState] | None = None
        for part in self.parts:
            if isinstance(part, Program):
                calls = self.body if not logits and part is self.parts[-1] else part.length
                after |= part.run(state, threads, calls)
                continue
            prefix, half = part
            if layers is None:
                layers = by_layer(state)
            number, name = prefix.split(".")[1:]
            y, own = half(self.into, under(name, layers.get(int(number), {})), shared)
            self.x += y
            if self.wide:
                self.into.copy_(self.x)
            after |= prefixed(prefix, own)
        if not logits:
            return self.x.new_empty(0), after
        if not self.recorded_head:
            return self.decoder.logits_of(self.decoder.norm(self.into)), after
        return self.logits.clone(), after
