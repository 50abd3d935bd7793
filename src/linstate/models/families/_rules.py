"""The weight table: which of their tensors make which of ours, by steps that can be undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linstate.errors import CheckpointError

Tensors = list[Tensor]
Read = Callable[[str], Tensor]
"""What gives the tensor of a name."""


class Step(ABC):
    """One way in which tensors differ between them and us. ``undo`` gives back, to the bit, what ``do`` was given."""

    @abstractmethod
    def do(self, tensors: Tensors) -> Tensors:
        """Theirs to ours."""

    @abstractmethod
    def undo(self, tensors: Tensors) -> Tensors:
        """Ours to theirs."""


class Concat(Step):
    """Several tensors are one of ours, one behind the other along ``axis``; ``sizes`` are their lengths there."""

    def __init__(self, *sizes: int, axis: int = 0) -> None:
        self.sizes, self.axis = list(sizes), axis

    def do(self, tensors: Tensors) -> Tensors:
        return [torch.cat(tensors, dim=self.axis)]

    def undo(self, tensors: Tensors) -> Tensors:
        (whole,) = tensors
        return list(whole.split(self.sizes, dim=self.axis))


class Split(Step):
    """One tensor is several of ours."""

    def __init__(self, *sizes: int, axis: int = 0) -> None:
        self.concat = Concat(*sizes, axis=axis)

    def do(self, tensors: Tensors) -> Tensors:
        return self.concat.undo(tensors)

    def undo(self, tensors: Tensors) -> Tensors:
        return self.concat.do(tensors)


class Stack(Step):
    """Several tensors of one shape are one of ours, along a new first axis."""

    def do(self, tensors: Tensors) -> Tensors:
        return [torch.stack(tensors)]

    def undo(self, tensors: Tensors) -> Tensors:
        (whole,) = tensors
        return list(whole.unbind())


class Unstack(Step):
    """One tensor is several of ours, along its first axis."""

    def do(self, tensors: Tensors) -> Tensors:
        return Stack().undo(tensors)

    def undo(self, tensors: Tensors) -> Tensors:
        return Stack().do(tensors)


class Each(Step):
    """A step of its own for each tensor; None leaves it as it is. A step makes one of one."""

    def __init__(self, *steps: Step | None) -> None:
        self.steps = steps

    def do(self, tensors: Tensors) -> Tensors:
        return [t if s is None else s.do([t])[0] for s, t in zip(self.steps, tensors, strict=True)]

    def undo(self, tensors: Tensors) -> Tensors:
        return [t if s is None else s.undo([t])[0] for s, t in zip(self.steps, tensors, strict=True)]


class Groups(Step):
    """The same step for every ``size`` tensors, which makes one of them."""

    def __init__(self, size: int, step: Step) -> None:
        self.size, self.step = size, step

    def do(self, tensors: Tensors) -> Tensors:
        return [
            made
            for at in range(0, len(tensors), self.size)
            for made in self.step.do(tensors[at : at + self.size])
        ]

    def undo(self, tensors: Tensors) -> Tensors:
        return [made for tensor in tensors for made in self.step.undo([tensor])]


class Order(Step):
    """The same entries along ``axis`` in another order: entry i of ours is entry ``order[i]`` of theirs."""

    def __init__(self, order: Tensor, axis: int = 0) -> None:
        self.order, self.axis = order, axis

    def do(self, tensors: Tensors) -> Tensors:
        return [t.index_select(self.axis, self.order.to(t.device)) for t in tensors]

    def undo(self, tensors: Tensors) -> Tensors:
        back = self.order.argsort()
        return [t.index_select(self.axis, back.to(t.device)) for t in tensors]


def interleaved(sizes: Sequence[int], groups: int, axis: int = 0) -> Order:
    """Theirs holds for each of ``groups`` groups its parts of these sizes, ours each part for all groups."""
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)
    return Order(torch.cat([part.flatten() for part in rows.split(list(sizes), dim=1)]), axis)


class Reshape(Step):
    """The same numbers in the same order in another shape."""

    def __init__(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        self.theirs, self.ours = tuple(theirs), tuple(ours)

    def do(self, tensors: Tensors) -> Tensors:
        return [t.reshape(self.ours) for t in tensors]

    def undo(self, tensors: Tensors) -> Tensors:
        return [t.reshape(self.theirs) for t in tensors]


class Squeeze(Step):
    """Theirs has an axis of length one that ours has not."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def do(self, tensors: Tensors) -> Tensors:
        return [t.squeeze(self.axis) for t in tensors]

    def undo(self, tensors: Tensors) -> Tensors:
        return [t.unsqueeze(self.axis) for t in tensors]


class Transpose(Step):
    """The last two axes change places."""

    def do(self, tensors: Tensors) -> Tensors:
        return [t.transpose(-1, -2).contiguous() for t in tensors]

    undo = do


class Scale(Step):
    """Ours is ``factor`` times theirs, made in float32: the one step that rounds (its inverse is right to the last bit or two).

    Args:
        factor: a number, or a tensor that broadcasts.
    """

    def __init__(self, factor: float | Tensor) -> None:
        self.factor = factor

    def do(self, tensors: Tensors) -> Tensors:
        return [t.float() * self.factor for t in tensors]

    def undo(self, tensors: Tensors) -> Tensors:
        return [t.float() / self.factor for t in tensors]


class Complement(Step):
    """Ours is one minus theirs, made in float64 (its inverse is right to the last bit or two of a float32)."""

    def do(self, tensors: Tensors) -> Tensors:
        return [1 - t.double() for t in tensors]

    undo = do


@dataclass(frozen=True)
class Rule:
    """``ours`` are made of ``theirs`` by ``steps``, one after the other."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def load(self, read: Read) -> dict[str, Tensor]:
        """Ours from theirs."""
        made = [read(name) for name in self.theirs]
        for step in self.steps:
            made = step.do(made)
        return dict(zip(self.ours, made, strict=True))

    def save(self, read: Read) -> dict[str, Tensor]:
        """Theirs from ours."""
        made = [read(name) for name in self.ours]
        for step in reversed(self.steps):
            made = step.undo(made)
        return dict(zip(self.theirs, made, strict=True))


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], *steps: Step) -> Rule:
    """A :class:`Rule`; one name may stand without a list."""
    return Rule(
        (theirs,) if isinstance(theirs, str) else tuple(theirs),
        (ours,) if isinstance(ours, str) else tuple(ours),
        steps,
    )


@dataclass(frozen=True)
class Redundant:
    """A tensor of theirs that says nothing that we do not know: it need not be there, but where it is it must be right.

    Attributes:
        value: what it must be; it is given a function that reads another tensor of theirs.
        written: whether their library writes it.
    """

    name: str
    value: Callable[[Read], Tensor]
    written: bool = True

    def check(self, read: Read) -> None:
        """Raises CheckpointError if the tensor is not what we know."""
        found, expected = read(self.name).float(), self.value(read).float()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-6):
            raise CheckpointError(
                f"{self.name} is not what the configuration says it is, and Linstate has no weight of its own for it"
            )


Table = Sequence[Rule | Redundant]


def tied(name: str, copy: str) -> Redundant:
    """The head of a model whose embedding is its head: older files hold it twice."""
    return Redundant(copy, lambda read: read(name), written=False)


def under(theirs: str, ours: str, table: Iterable[Rule]) -> list[Rule]:
    """The same rules with a prefix before their and our names."""
    return [
        Rule(tuple(theirs + n for n in r.theirs), tuple(ours + n for n in r.ours), r.steps) for r in table
    ]


def save(table: Iterable[Rule | Redundant], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names: the inverse of the table."""
    found: dict[str, Tensor] = {}
    for entry in table:
        if isinstance(entry, Rule):
            found |= entry.save(weights.__getitem__)
        elif entry.written:
            found[entry.name] = entry.value(found.__getitem__)
    return found
