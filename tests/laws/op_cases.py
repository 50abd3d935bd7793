"""Inputs for every recurrence, in every variant of its gates: what the laws are tried on.

A new room of ``ops/`` gets a generator here, entered with :func:`cases_of`; ``test_discovery.py`` fails
until it has one. Master values are float64; :meth:`Case.to` casts them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, update_wrapper
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from laws.laws import BOUND, Op, Subject, leaves
from linstate import ops
from linstate.errors import BackendError
from linstate.ops import dispatch, native
from linstate.ops.softmax_attention import KVCache

WINDOW = 7


@dataclass(frozen=True)
class Sizes:
    """The dimension letters of :mod:`linstate.types`. ``grouped`` cases have twice the value heads."""

    B: int = 2
    T: int = 12
    H: int = 2
    K: int = 6
    V: int = 5


TINY = Sizes(B=1, T=3, H=1, K=2, V=2)
WIDE = Sizes(B=1, T=65, H=1, K=64, V=64)  # kernels may refuse small or odd heads: these they take


@dataclass(frozen=True)
class Case:
    """One call of an op: arguments with a time axis, arguments without, a state to start from."""

    recurrence: str
    variant: str
    sequences: dict[str, Tensor]
    fixed: dict[str, Any]
    initial: Any

    def __str__(self) -> str:
        value = next(t for t in self.sequences.values())
        return f"{self.recurrence} ({self.variant}, T={self.tokens}, {value.dtype})"

    @property
    def tokens(self) -> int:
        return next(iter(self.sequences.values())).shape[1]

    @property
    def output_dtype(self) -> torch.dtype:
        return next(self.sequences[name] for name in ("v", "x", "u") if name in self.sequences).dtype

    def tensors(self) -> dict[str, Tensor]:
        """Every floating point tensor that is given, by name."""
        parts = (
            {"": self.initial}
            if isinstance(self.initial, Tensor) or self.initial is None
            else leaves(self.initial)
        )
        initial = {f"initial_state.{name}".rstrip("."): t for name, t in parts.items()}
        found = {**self.sequences, **self.fixed, **initial}
        return {name: t for name, t in found.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def replaced(self, tensors: Mapping[str, Tensor]) -> Case:
        """The same call with these tensors (names as in :meth:`tensors`)."""
        if isinstance(self.initial, tuple):
            initial = type(self.initial)(
                *(tensors.get(f"initial_state.{name}", t) for name, t in self.initial._asdict().items())
            )
        elif isinstance(self.initial, dict):
            initial = {name: tensors.get(f"initial_state.{name}", t) for name, t in self.initial.items()}
        else:
            initial = tensors.get("initial_state", self.initial)
        return replace(
            self,
            sequences={name: tensors.get(name, t) for name, t in self.sequences.items()},
            fixed={name: tensors.get(name, x) for name, x in self.fixed.items()},
            initial=initial,
        )

    def to(self, dtype: torch.dtype, *, gates: torch.dtype | None = None) -> Case:
        """In ``dtype``; log gates (``g``) in ``gates`` if given. A state stays float32, float64 for float64; a cache does not."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        chosen = {"g": gates or dtype, "initial_state": wide}
        if isinstance(self.initial, dict):
            chosen |= {f"initial_state.{name}": wide for name in self.initial}
        return self.replaced({name: t.to(chosen.get(name, dtype)) for name, t in self.tensors().items()})

    def piece(self, start: int, end: int) -> Case:
        """The call with tokens start to end only, from the same state."""
        return replace(self, sequences={name: t[:, start:end] for name, t in self.sequences.items()})

    def run(self, op: Op, **options: Any) -> tuple[Tensor, Any]:
        return op(**self._whole(), initial_state=self.initial, **options)

    def summary(self, summarise: Callable[..., Any], op: Op, **options: Any) -> Any:
        return summarise(op, **self._whole(), **options)

    def _whole(self) -> dict[str, Any]:
        missing = dict.fromkeys(("q", "k")) if self.recurrence == "selective_scan" else {}
        return {**missing, **self.sequences, **self.fixed}

    def subject(self, op: Op, name: str = "") -> Subject:
        """As the laws of reading see it."""

        def read(inputs: dict[str, Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
            return replace(self, sequences=inputs, initial=state).run(op, cu_seqlens=cu_seqlens)

        return Subject(f"{self}{name}", read, self.sequences, self.initial)


class Draw:
    """Random tensors in float64, always the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.random, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.random, dtype=torch.float64)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length one, up to what bfloat16 makes of them."""
        return F.normalize(self.normal(*shape), dim=-1)

    def gates(self, *shape: int) -> Tensor:
        """Log gates: mostly slow decay, now and then a fast one."""
        return -(self.normal(*shape) * 1.5 - 2).exp()


Generator_ = Callable[[Draw, Sizes], Iterator[tuple[str, dict[str, Tensor | None], dict[str, Any], Any]]]
GENERATORS: dict[str, Generator_] = {}


def cases_of(recurrence: str) -> Callable[[Generator_], Generator_]:
    """Decorator: this yields (variant, sequences, fixed, initial state) for the recurrence."""

    def enter(generator: Generator_) -> Generator_:
        GENERATORS[recurrence] = generator
        return generator

    return enter


def cases(recurrence: str, sizes: Sizes, seed: int = 0) -> list[Case]:
    """Every variant of a recurrence at these sizes, in float64."""
    found = []
    for variant, sequences, fixed, initial in GENERATORS[recurrence](Draw(seed), sizes):
        given = {name: t for name, t in sequences.items() if t is not None}
        found.append(
            Case(recurrence, variant, given, {n: x for n, x in fixed.items() if x is not None}, initial)
        )
    return found


def matrix_gates(
    draw: Draw, s: Sizes
) -> Iterator[tuple[str, int, int, dict[str, Tensor], dict[str, Tensor]]]:
    """(variant, Hk, Hv, gate with a time axis, gate without) of the matrix recurrences."""
    H, G = s.H, 2 * s.H
    yield "no gate", H, H, {}, {}
    yield "no gate, grouped heads", H, G, {}, {}
    yield "gate fixed per head", H, H, {}, {"g": draw.gates(H)}
    yield "gate fixed per head, grouped heads", H, G, {}, {"g": draw.gates(G)}
    yield "gate per head", H, H, {"g": draw.gates(s.B, s.T, H)}, {}
    yield "gate per head, grouped heads", H, G, {"g": draw.gates(s.B, s.T, G)}, {}
    yield "gate per channel", H, H, {"g": draw.gates(s.B, s.T, H, s.K)}, {}
    yield "gate per channel, grouped heads", H, G, {"g": draw.gates(s.B, s.T, G, s.K)}, {}
    yield "gate per channel of k's heads, grouped heads", H, G, {"g": draw.gates(s.B, s.T, H, s.K)}, {}


@cases_of("linear_attention")
def _linear_attention(draw: Draw, s: Sizes) -> Iterator[Any]:
    for variant, hk, hv, gate, fixed_gate in matrix_gates(draw, s):
        qkv = {
            "q": draw.normal(s.B, s.T, hk, s.K),
            "k": draw.normal(s.B, s.T, hk, s.K),
            "v": draw.normal(s.B, s.T, hv, s.V),
        }
        initial = draw.normal(s.B, hv, s.K, s.V)
        yield variant, {**qkv, **gate}, fixed_gate, initial
        if not fixed_gate:
            yield f"{variant}, bonus", {**qkv, **gate}, {"bonus": draw.normal(hv, s.K)}, initial
        if variant == "gate per head":
            yield f"{variant}, scale 1.7", {**qkv, **gate}, {"scale": 1.7}, initial


@cases_of("delta_rule")
def _delta_rule(draw: Draw, s: Sizes) -> Iterator[Any]:
    for variant, hk, hv, gate, fixed_gate in matrix_gates(draw, s):
        sequences = {
            "q": draw.normal(s.B, s.T, hk, s.K),
            "k": draw.unit(s.B, s.T, hk, s.K),
            "v": draw.normal(s.B, s.T, hv, s.V),
            "beta": draw.uniform(s.B, s.T, hv),
            **gate,
        }
        initial = draw.normal(s.B, hv, s.K, s.V)
        yield variant, sequences, fixed_gate, initial
        if variant in ("no gate", "gate per head"):
            doubled = {**sequences, "beta": 2 * sequences["beta"]}
            yield f"{variant}, negative eigenvalues", doubled, {**fixed_gate, "scale": 1.0}, initial


@cases_of("dplr")
def _dplr(draw: Draw, s: Sizes) -> Iterator[Any]:
    for variant, hk, hv, gate, fixed_gate in matrix_gates(draw, s):
        b = draw.unit(s.B, s.T, hk, s.K)
        sequences = {
            "q": draw.normal(s.B, s.T, hk, s.K),
            "k": draw.normal(s.B, s.T, hk, s.K, scale=0.5),
            "v": draw.normal(s.B, s.T, hv, s.V),
            "a": -b * draw.uniform(s.B, s.T, hk, s.K, high=0.9),
            "b": b,
            **gate,
        }
        yield variant, sequences, fixed_gate, draw.normal(s.B, hv, s.K, s.V)


@cases_of("selective_scan")
def _selective_scan(draw: Draw, s: Sizes) -> Iterator[Any]:
    for variant, hk, hv, read, A in (
        ("with A", s.H, s.H, True, True),
        ("with A, grouped heads", s.H, 2 * s.H, True, True),
        ("without A", s.H, s.H, True, False),
        ("without A, grouped heads", s.H, 2 * s.H, True, False),
        ("without q, k and A", s.H, s.H, False, False),
        ("with A, without q and k", s.H, s.H, False, True),
    ):
        K = s.K if read else 1
        gates = draw.gates(s.B, s.T, hv, s.V)
        sequences = {
            "q": draw.normal(s.B, s.T, hk, K) if read else None,
            "k": draw.normal(s.B, s.T, hk, K) if read else None,
            "v": draw.normal(s.B, s.T, hv, s.V),
            "g": -gates if A else gates,
        }
        fixed = {"A": -draw.uniform(hv, K, s.V, low=0.1, high=2.0) if A else None}
        yield variant, sequences, fixed, draw.normal(s.B, hv, K, s.V)
        if variant == "with A":
            yield f"{variant}, scale 0.3", sequences, {**fixed, "scale": 0.3}, draw.normal(s.B, hv, K, s.V)


@cases_of("causal_conv1d")
def _causal_conv1d(draw: Draw, s: Sizes) -> Iterator[Any]:
    D = s.H * s.K
    for width in (4, 3, 1):
        for bias in (False, True):
            for activation in (None, "silu"):
                fixed = {
                    "weight": draw.normal(D, width),
                    "bias": draw.normal(D) if bias else None,
                    "activation": activation,
                }
                name = f"width {width}{', bias' if bias else ''}{', silu' if activation else ''}"
                yield name, {"x": draw.normal(s.B, s.T, D)}, fixed, draw.normal(s.B, width - 1, D)


@cases_of("state_space")
def _state_space(draw: Draw, s: Sizes) -> Iterator[Any]:
    D, N = s.H * s.V, s.K

    def pairs(*shape: int, scale: float = 1.0) -> Tensor:
        return draw.normal(*shape, 2, scale=scale)

    for variant, low_rank in (("diagonal", False), ("diagonal plus low rank", True)):
        size, angle = draw.uniform(D, N, low=0.5, high=0.9), draw.uniform(D, N, high=6.3)
        fixed = {
            "A": torch.stack([size * angle.cos(), size * angle.sin()], -1),
            "B": pairs(D, N),
            "C": pairs(D, N),
            "a": pairs(D, N, scale=0.3 / N) if low_rank else None,
            "b": pairs(D, N, scale=0.3) if low_rank else None,
        }
        yield variant, {"u": draw.normal(s.B, s.T, D)}, fixed, pairs(s.B, D, N)


@cases_of("test_time_training")
def _test_time_training(draw: Draw, s: Sizes) -> Iterator[Any]:
    """Rows that stand at different places of their mini-batches; its size is never that of a chunk of the others."""
    H, K, F = s.H, s.K, s.K + 3
    for variant, size, shapes in (
        ("linear", 5, ((K + 1, K),)),
        ("linear, mini-batch of one", 1, ((K + 1, K),)),
        ("two layers", 6, ((K + 1, F), (F + 1, K))),
    ):
        layers = {
            f"W{i}": draw.normal(H, *shape, scale=shape[0] ** -0.5) for i, shape in enumerate(shapes, 1)
        }
        fixed = {
            **layers,
            "norm_weight": 1 + draw.normal(H, K, scale=0.2),
            "norm_bias": draw.normal(H, K, scale=0.2),
            "share": draw.uniform(size),
            "eps": 0.1,
        }
        sequences = {
            **{name: draw.normal(s.B, s.T, H, K) for name in ("q", "k", "v")},
            "lr": draw.uniform(s.B, s.T, H, high=0.3 / K),
        }
        initial = {name: draw.normal(s.B, *w.shape, scale=0.3) for name, w in layers.items()}
        initial |= {f"G{i}": draw.normal(s.B, *w.shape, scale=0.3) for i, w in enumerate(layers.values(), 1)}
        yield variant, sequences, fixed, {**initial, "count": (3 + 2 * torch.arange(s.B)) % size}


@cases_of("softmax_attention")
def _softmax_attention(draw: Draw, s: Sizes) -> Iterator[Any]:
    for variant, window, groups in (
        ("full", None, 1),
        ("full, grouped heads", None, 2),
        ("window", WINDOW, 1),
        ("window, grouped heads", WINDOW, 2),
        ("window of one", 1, 1),
        ("window longer than the text", s.T + 20, 1),
    ):
        sequences = {
            "q": draw.normal(s.B, s.T, s.H * groups, s.K),
            "k": draw.normal(s.B, s.T, s.H, s.K),
            "v": draw.normal(s.B, s.T, s.H, s.V),
        }
        places = 9 if window is None else window - 1
        # rows that have read 9, 6, 3, ... tokens: what stands before the last `length` places must not count
        length = (9 - 3 * torch.arange(s.B)).clamp(min=0, max=places)
        cache = KVCache(draw.normal(s.B, places, s.H, s.K), draw.normal(s.B, places, s.H, s.V), length)
        yield variant, sequences, {"window": window}, cache
        if variant == "full":
            yield f"{variant}, scale 0.2", sequences, {"window": window, "scale": 0.2}, cache


# ------------------------------------------------------------------------------------------- what there is


FUSED = "fused"


def rooms() -> list[str]:
    """The recurrences for which ``ops/`` has a room."""
    packages = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]
    return sorted(set(packages) - set(dispatch.BACKENDS) - {FUSED})


def op_of(recurrence: str) -> Op:
    return getattr(ops, recurrence)


def kernels() -> list[tuple[str, str, str]]:
    """(recurrence, form, backend) of every kernel in the table; native ones for each instruction set of this machine.

    But for Triton's, which take no tensor on a CPU, or only in a process of their own: ``tests/ops/test_triton*.py`` hold them to the laws.
    """
    found: list[tuple[str, str, str]] = []
    for recurrence, form, backend in sorted(dispatch.TABLE):
        if backend == "triton" or recurrence == FUSED:  # what reads a mixer's projections: test_fused.py
            continue
        sets = native.isas() if backend == "native" else ()
        found += [(recurrence, form, f"native {isa}") for isa in sets] or [(recurrence, form, backend)]
    return found


def kernel(recurrence: str, form: str, backend: str) -> Op:
    """The op with one kernel of the table asked for by name. Raises BackendError where that one refuses.

    "native avx2" runs with that instruction set. The best set gets one thread, the others two: that the number of threads
    changes no bit is a test of its own (``tests/ops/test_native_matrix.py``).
    """
    op = op_of(recurrence)
    backend, _, isa = backend.partition(" ")
    if not isa:
        return update_wrapper(partial(op, form=form, backend=backend), op)

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if isa == native.isas()[0] else 2)
        try:
            with native.using(isa):
                result: tuple[Tensor, Tensor] = op(*args, form=form, backend=backend, **kwargs)
                return result
        finally:
            torch.set_num_threads(threads)

    return update_wrapper(run, op)


def definition(recurrence: str) -> Op:
    return kernel(recurrence, "recurrent", "torch")


def refusal(op: Op, case: Case, **options: Any) -> str | None:
    """Why a kernel does not take this call; None where it does."""
    try:
        case.run(op, **options)
    except BackendError as error:
        return str(error)
    return None


def with_gradients(case: Case) -> Case:
    return case.replaced({name: t.detach().clone().requires_grad_() for name, t in case.tensors().items()})


def accepted(name: tuple[str, str, str], sizes: Sizes, *, reads: int | None = None) -> list[Case]:
    """The cases that a kernel takes, in the widest dtype in which it takes them (float64 shows most).

    A kernel that refuses small heads gets larger ones; one that refuses everything is skipped, with its reason.
    With ``reads`` it is asked for the first so many tokens only.
    """
    why = None
    for wanted in (sizes, replace(sizes, K=64, V=64), replace(sizes, K=128, V=128)):
        found = []
        for case in cases(name[0], wanted):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                cast = case.to(dtype)
                why = None if name[2] == "torch" else refusal(kernel(*name), cast.piece(0, reads or sizes.T))
                if why is None:
                    found.append(cast)
                    break
        if found:
            return found
    pytest.skip(f"{'-'.join(name)} takes no call on this machine: {why}")


def bound_of(case: Case) -> float:
    return BOUND[case.output_dtype]
