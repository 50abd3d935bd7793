"""
Linstate's compiled part. Use linstate.ops.native, which also serves where this is absent.
"""

from collections.abc import Sequence
import enum
from typing import overload

import torch


def version() -> str:
    """The version of Linstate that this module was built from."""

def cpu_features() -> dict[str, bool]:
    """
    Instruction sets that the processor has and the operating system supports, by name.
    """

def isas(emulated: bool = False) -> list[str]:
    """
    The instruction sets with kernels that this machine can run, the best first; then those emulated for tests.
    """

def isa() -> str:
    """The instruction set in use."""

def use(isa: str) -> None:
    """Use the kernels of one instruction set from now on, in every thread."""

def join_team(parallel: int, thread_number: int, most_threads: int) -> None:
    """
    Run on the threads of an OpenMP library (pool.hpp): addresses of its functions, 0 for threads of our own.
    """

class Program:
    """Native calls to repeat; see linstate/ops/native/program.py."""

    def __init__(self) -> None: ...

    def attend(self, plan: AttendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def linear(self, format: Format, x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def embed(self, format: Format, outputs: int, inputs: int, ids: torch.Tensor, words: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def mixer(self, plan: MixerPlan, mixed: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, beta: torch.Tensor | None, step: torch.Tensor | None, rate: torch.Tensor | None, step_bias: torch.Tensor | None, skip: torch.Tensor | None, bonus: torch.Tensor | None, norm: torch.Tensor | None, norm_bias: torch.Tensor | None, z: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None, position: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def norm(self, x: torch.Tensor, groups: int, eps: float, centre: bool, weight: torch.Tensor | None, weight_plus: float, bias: torch.Tensor | None, gate: OutputGate, z: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def gated(self, x: torch.Tensor, out: torch.Tensor) -> None: ...

    def activate(self, kind: Activation, x: torch.Tensor, out: torch.Tensor) -> None: ...

    def add(self, x: torch.Tensor, y: torch.Tensor, read: torch.Tensor | None, fresh: bool) -> None: ...

    def stream(self, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None: ...

    @property
    def size(self) -> int: ...

    def run(self, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], count: int, past: bool, threads: int) -> None: ...

    def shift(self, x: torch.Tensor, mix: torch.Tensor, out: torch.Tensor) -> None: ...

    def rwkv7(self, heads: int, eps: float, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, value_rate: torch.Tensor | None, first_value: torch.Tensor | None, gate: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor, r_k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None: ...

class AttendPlan:
    """Of an attention layer; see linstate/ops/native/attend.py."""

    def __init__(self, *, hq: int, hk: int, k: int, v: int, turned: int, eps: float, weight_plus: float, scale: float, rotary_base: float) -> None: ...

def attend(plan: AttendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, z: torch.Tensor | None, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, out: torch.Tensor, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], threads: int) -> None:
    """
    One token of softmax attention between its projections; see linstate/ops/native/attend.py.
    """

def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, window: int, scale: float, out: torch.Tensor, threads: int) -> None:
    """
    Softmax attention over keys that lie in one tensor; see linstate/ops/native/attention.py.
    """

def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool, bounds: torch.Tensor | None, before: torch.Tensor | None, after: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """The short causal convolution; see linstate/ops/native/scan.py."""

class Format(enum.Enum):
    """Of a packed weight."""

    bf16 = 16

    int8 = 8

    int4 = 4

def linear(format: Format, x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """
    y = x W^T + bias with a packed weight; see linstate/ops/native/linear.py.
    """

def embed(format: Format, outputs: int, inputs: int, ids: torch.Tensor, words: torch.Tensor, scales: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """Rows of a packed weight; see linstate/ops/native/linear.py."""

class Recurrence(enum.Enum):
    """On a matrix state."""

    linear_attention = 0

    delta_rule = 1

    dplr = 2

def matrix(recurrence: Recurrence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None, beta: torch.Tensor | None, g: torch.Tensor | None, bonus: torch.Tensor | None, scale: float, bounds: torch.Tensor | None, before: torch.Tensor | None, after: torch.Tensor, out: torch.Tensor, kept: torch.Tensor | None, every: int, threads: int) -> None:
    """
    A chunked recurrence on a matrix state; see linstate/ops/native/matrix.py.
    """

def step(recurrence: Recurrence, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None, beta: torch.Tensor | None, g: torch.Tensor | None, bonus: torch.Tensor | None, scale: float, before: torch.Tensor | None, after: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """
    One token of a recurrence on a matrix state; see linstate/ops/native/step.py.
    """

def scan(q: torch.Tensor | None, k: torch.Tensor | None, v: torch.Tensor, g: torch.Tensor, rates: torch.Tensor | None, scale: float, bounds: torch.Tensor | None, before: torch.Tensor | None, after: torch.Tensor, out: torch.Tensor, kept: torch.Tensor | None, every: int, threads: int) -> None:
    """The elementwise scan; see linstate/ops/native/scan.py."""

def memory(bytes: int, kept: bool) -> torch.Tensor:
    """
    A tensor of so many bytes in huge pages; kept: its memory is kept when it goes. See linstate/ops/native/memory.py.
    """

class Decay(enum.Enum):
    none = 0

    head = 1

    channel = 2

    sigmoid = 3

    fixed = 4

    exponential = 5

class Norm(enum.Enum):
    none = 0

    head = 1

    group = 2

    centred = 3

class MixerPlan:
    """
    What a mixer does between its projections; see linstate/ops/native/mixer.py.
    """

    def __init__(self) -> None: ...

    def __deepcopy__(self, memo: object) -> MixerPlan: ...

    @property
    def hk(self) -> int: ...

    @hk.setter
    def hk(self, arg: int, /) -> None: ...

    @property
    def hv(self) -> int: ...

    @hv.setter
    def hv(self, arg: int, /) -> None: ...

    @property
    def k(self) -> int: ...

    @k.setter
    def k(self, arg: int, /) -> None: ...

    @property
    def v(self) -> int: ...

    @v.setter
    def v(self, arg: int, /) -> None: ...

    @property
    def recurrence(self) -> Recurrence: ...

    @recurrence.setter
    def recurrence(self, arg: Recurrence, /) -> None: ...

    @property
    def q_at(self) -> int: ...

    @q_at.setter
    def q_at(self, arg: int, /) -> None: ...

    @property
    def k_at(self) -> int: ...

    @k_at.setter
    def k_at(self, arg: int, /) -> None: ...

    @property
    def v_at(self) -> int: ...

    @v_at.setter
    def v_at(self, arg: int, /) -> None: ...

    @property
    def conv_at(self) -> int: ...

    @conv_at.setter
    def conv_at(self, arg: int, /) -> None: ...

    @property
    def channels(self) -> int: ...

    @channels.setter
    def channels(self, arg: int, /) -> None: ...

    @property
    def taps(self) -> int: ...

    @taps.setter
    def taps(self, arg: int, /) -> None: ...

    @property
    def decay(self) -> Decay: ...

    @decay.setter
    def decay(self, arg: Decay, /) -> None: ...

    @property
    def divisor(self) -> float: ...

    @divisor.setter
    def divisor(self, arg: float, /) -> None: ...

    @property
    def step_low(self) -> float: ...

    @step_low.setter
    def step_low(self, arg: float, /) -> None: ...

    @property
    def step_high(self) -> float: ...

    @step_high.setter
    def step_high(self, arg: float, /) -> None: ...

    @property
    def stepped_values(self) -> bool: ...

    @stepped_values.setter
    def stepped_values(self, arg: bool, /) -> None: ...

    @property
    def elu_plus_one(self) -> bool: ...

    @elu_plus_one.setter
    def elu_plus_one(self, arg: bool, /) -> None: ...

    @property
    def rotary_base(self) -> float: ...

    @rotary_base.setter
    def rotary_base(self, arg: float, /) -> None: ...

    @property
    def unit_eps(self) -> float: ...

    @unit_eps.setter
    def unit_eps(self, arg: float, /) -> None: ...

    @property
    def scale(self) -> float: ...

    @scale.setter
    def scale(self, arg: float, /) -> None: ...

    @property
    def beta_scale(self) -> float: ...

    @beta_scale.setter
    def beta_scale(self, arg: float, /) -> None: ...

    @property
    def normaliser_eps(self) -> float: ...

    @normaliser_eps.setter
    def normaliser_eps(self, arg: float, /) -> None: ...

    @property
    def norm(self) -> Norm: ...

    @norm.setter
    def norm(self, arg: Norm, /) -> None: ...

    @property
    def norm_eps(self) -> float: ...

    @norm_eps.setter
    def norm_eps(self, arg: float, /) -> None: ...

    @property
    def gate(self) -> OutputGate: ...

    @gate.setter
    def gate(self, arg: OutputGate, /) -> None: ...

    @property
    def gate_first(self) -> bool: ...

    @gate_first.setter
    def gate_first(self, arg: bool, /) -> None: ...

def mixer(plan: MixerPlan, mixed: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, beta: torch.Tensor | None, step: torch.Tensor | None, rate: torch.Tensor | None, step_bias: torch.Tensor | None, skip: torch.Tensor | None, bonus: torch.Tensor | None, norm: torch.Tensor | None, norm_bias: torch.Tensor | None, z: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None, position: torch.Tensor | None, out: torch.Tensor, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], threads: int) -> None:
    """
    One token of a mixer between its projections; see linstate/ops/native/mixer.py.
    """

def mixer_gates(plan: MixerPlan, mixed: torch.Tensor, beta: torch.Tensor | None, step: torch.Tensor | None, rate: torch.Tensor | None, step_bias: torch.Tensor | None, key: torch.Tensor | None, value: torch.Tensor | None, q_out: torch.Tensor | None, k_out: torch.Tensor | None, v_out: torch.Tensor | None, beta_out: torch.Tensor | None, g_out: torch.Tensor | None, threads: int) -> None:
    """
    What stands before the recurrence of many tokens; see linstate/ops/native/block.py.
    """

def mixer_finish(plan: MixerPlan, mixed: torch.Tensor, skip: torch.Tensor | None, norm: torch.Tensor | None, norm_bias: torch.Tensor | None, z: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """What follows it, in place; see linstate/ops/native/block.py."""

class OutputGate(enum.Enum):
    """What z passes before it multiplies."""

    none = 0

    silu = 1

    sigmoid = 2

class Activation(enum.Enum):
    sigmoid = 0

    tanh = 1

    relu_squared = 2

def norm(x: torch.Tensor, groups: int, eps: float, centre: bool, weight: torch.Tensor | None, weight_plus: float, bias: torch.Tensor | None, gate: OutputGate, z: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """
    A norm over the last axis with its gate; see linstate/ops/native/norm.py.
    """

def gated(x: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """silu(x) y of the two halves of rows."""

def activate(kind: Activation, x: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """An activation of numbers in bf16."""

def add(x: torch.Tensor, y: torch.Tensor, read: torch.Tensor | None, fresh: bool, threads: int) -> None:
    """x += y; `read` is the sum in bf16, where x is float32."""

def stream(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """A residual stream in float32 and what a branch made."""

class Row:
    """
    The places that one row of attend_rows looks at; they must outlive the call.
    """

    @overload
    def __init__(self) -> None:
        """It sees only itself, and is written nowhere."""

    @overload
    def __init__(self, keys: torch.Tensor, keys_first: int, values: torch.Tensor, values_first: int, places: int, to_keys: torch.Tensor | None, to_keys_first: int, to_values: torch.Tensor | None, to_values_first: int, moved: int) -> None: ...

def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Sequence[Row], scale: float, out: torch.Tensor, threads: int) -> None:
    """
    Softmax attention of one token a row; see linstate/ops/native/row_attention.py.
    """

def shift(x: torch.Tensor, mix: torch.Tensor, out: torch.Tensor, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], threads: int) -> None:
    """One token's shift, for several rates; see linstate/ops/native/rwkv.py."""

def rwkv7(heads: int, eps: float, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, value_rate: torch.Tensor | None, first_value: torch.Tensor | None, gate: torch.Tensor, k_k: torch.Tensor, k_a: torch.Tensor, r_k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, before: Sequence[torch.Tensor | None], after: Sequence[torch.Tensor | None], threads: int) -> None:
    """
    One token of RWKV-7 between its projections; see linstate/ops/native/rwkv.py.
    """

def shift_tokens(x: torch.Tensor, mix: torch.Tensor, before: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """RWKV's shift of many tokens; see linstate/ops/native/block.py."""

def rwkv7_gates(heads: int, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, rate: torch.Tensor, value_rate: torch.Tensor | None, first_value: torch.Tensor | None, k_k: torch.Tensor, k_a: torch.Tensor, k_out: torch.Tensor, v_out: torch.Tensor | None, a_out: torch.Tensor, b_out: torch.Tensor, g_out: torch.Tensor, threads: int) -> None:
    """
    What stands before RWKV-7's recurrence; see linstate/ops/native/block.py.
    """

def rwkv7_finish(heads: int, eps: float, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, r_k: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """What follows it, in place; see linstate/ops/native/block.py."""

def core(bf16: bool, solve: bool, a: torch.Tensor, b: torch.Tensor | None, c: torch.Tensor, keep: bool, row_scale: torch.Tensor | None, shape: int) -> None:
    """
    A matmul core of the instruction set in use, for tests/ops/test_native_tiles.py.
    """
