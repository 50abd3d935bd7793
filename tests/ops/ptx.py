"""PTX on a CPU: what Triton compiled for a GPU is executed where there is none.

Under Triton's interpreter the text of a program is run, not what the compiler makes of it; here it is the compiler's output: one warp after
the other between barriers, in any order, so that a missing barrier shows. It knows the instructions that the programs of recurrences come
to at small sizes (``mma.sync``, ``ldmatrix``, ``cp.async``; no ``wgmma``), and says which one it does not know. Shared memory begins as NaN, and
what was not allocated cannot be read or written.

Registers hold their bits in 64 bits for each of 32 lanes, predicates are boolean. Lines of PTX are split at semicolons.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES = np.arange(32)
LOW = np.uint64(0xFFFFFFFF)


def of_bfloat16(bits: Any) -> Any:
    return (
        ((np.asarray(bits, np.uint64) & np.uint64(0xFFFF)) << np.uint64(16))
        .astype(np.uint32)
        .view(np.float32)
    )


def to_bfloat16(x: Any) -> Any:
    """Rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)


def bits_of(x: Any) -> Any:
    return np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)


class Memory:
    """Global memory; gaps between what is allocated."""

    def __init__(self, size: int = 1 << 24) -> None:
        self.bytes, self.allocated, self.free = np.zeros(size, np.uint8), np.zeros(size, bool), 1 << 16

    def put(self, data: bytes) -> int:
        """The address of a copy, a multiple of 4,096."""
        at = self.free
        self.bytes[at : at + len(data)] = np.frombuffer(data, np.uint8)
        self.allocated[at : at + len(data)] = True
        self.free = (at + len(data) + 8191) // 4096 * 4096
        return at

    def check(self, at: Any, size: int, what: str) -> None:
        if not (self.allocated[at].all() and self.allocated[at + size - 1].all()):
            raise AssertionError(f"outside of what is allocated: {what}")


@dataclass
class Program:
    """Instructions (predicate, whether negated, name, operands), and where labels stand among them."""

    instructions: list[tuple[str | None, bool, str, list[str]]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> Program:
        found = cls()
        entry = text[text.index(".entry") :]
        found.parameters = re.findall(r"(\w+_param_\d+)", entry[: entry.index(")")])
        body = re.sub(r"//[^\n]*", "", entry[entry.index("{") + 1 :])
        body = re.sub(r"^\s*\.(loc|section|file)[^\n]*", "", body, flags=re.MULTILINE)
        for line in body.split(";"):
            rest = line.strip()
            while label := re.match(r"[{\s]*(\$L\w+):\s*", rest):
                found.labels[label[1]] = len(found.instructions)
                rest = rest[label.end() :].strip()
            match = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", rest, re.DOTALL)
            if match:
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[4].replace("\n", " "))
                found.instructions.append(
                    (match[2], match[1] == "!", match[3], [o.strip() for o in operands])
                )
        return found


class Warp:
    def __init__(
        self, program: Program, memory: Memory, shared: Any, values: dict[str, int], block: int, number: int
    ) -> None:
        self.program, self.memory, self.shared, self.values = program, memory, shared, values
        self.registers: dict[str, Any] = {}
        self.special = {"%tid.x": LANES + 32 * number, "%ctaid.x": np.full(32, block)}
        self.copies: list[list[tuple[int, Any]]] = []
        self.issued: list[tuple[int, Any]] = []

    # ----------------------------------------------------------------------------------------------- operands

    def get(self, operand: str, bits: int = 32) -> Any:
        if operand.startswith("%tid") or operand.startswith("%ctaid"):
            value = self.special.get(operand, np.zeros(32, np.int64)).astype(np.uint64)
        elif operand.startswith("%"):
            value = self.registers[operand].astype(np.uint64)
        elif operand == "global_smem":
            value = np.zeros(32, np.uint64)
        elif operand.startswith("0f"):
            value = np.full(32, int(operand[2:], 16), np.uint64)
        else:
            value = np.full(32, int(operand, 0) & (1 << 64) - 1, np.uint64)
        return value if bits == 64 else value & np.uint64((1 << bits) - 1)

    def signed(self, operand: str, bits: int) -> Any:
        value = self.get(operand, bits)
        return value.view(np.int64) if bits == 64 else value.astype(np.uint32).view(np.int32).astype(np.int64)

    def number(self, operand: str) -> Any:
        return self.get(operand).astype(np.uint32).view(np.float32)

    def address(self, operand: str) -> Any:
        match = re.match(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match is not None
        return (self.get(match[1], 64) + np.uint64(int(match[2] or 0) & (1 << 64) - 1)).astype(np.int64)

    def put(self, name: str, value: Any, active: Any = None) -> None:
        if active is not None and name in self.registers:
            value = np.where(active, value, self.registers[name])
        self.registers[name] = np.asarray(value)

    # ------------------------------------------------------------------------------------------- instructions

    def run(self) -> Iterator[None]:
        """Stops at each barrier."""
        at = 0
        while at < len(self.program.instructions):
            predicate, negated, name, operands = self.program.instructions[at]
            at += 1
            active = np.ones(32, bool)
            if predicate is not None:
                active = self.registers[predicate].astype(bool) ^ negated
            if name.startswith(("bra", "ret")):
                assert active.all() or not active.any(), "lanes of a warp part"
                if active.any():
                    if name == "ret":
                        return
                    at = self.program.labels[operands[0]]
            elif name == "bar.sync":
                yield
            elif name != "bar.warp.sync":
                self.execute(name, operands, active, predicate is not None)

    def execute(self, name: str, operands: list[str], active: Any, predicated: bool) -> None:
        parts = name.split(".")
        kind, type_ = parts[0], parts[-1]
        if kind in ("ld", "st"):
            self.move(parts, operands, active)
        elif kind == "cp":
            self.copy(name, operands, active)
        elif kind == "mma":
            self.multiply(operands)
        elif kind in ("ldmatrix", "stmatrix"):
            self.matrix(parts, operands)
        elif kind == "shfl":
            other = self.get(operands[2]).astype(np.int64)
            source = LANES ^ other if parts[2] == "bfly" else other & 31
            self.put(operands[0].split("|")[0], self.get(operands[1])[source])
        elif kind == "mov":
            self.mov(type_, operands, active if predicated else None)
        elif kind == "cvt":
            self.put(operands[0], self.converted(parts, operands))
        elif kind == "setp":
            self.put(operands[0], self.compared(parts[1], type_, operands))
        elif kind == "selp":
            chosen = self.registers[operands[3]].astype(bool)
            self.put(operands[0], np.where(chosen, self.get(operands[1], 64), self.get(operands[2], 64)))
        elif type_ == "pred":
            values = [
                self.registers[o].astype(bool) if o.startswith("%") else int(o, 0) != 0 for o in operands[1:]
            ]
            self.put(
                operands[0],
                {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}[
                    kind
                ](*values),
            )
        elif "f32" in parts:
            self.put(operands[0], bits_of(self.on_floats(kind, [self.number(o) for o in operands[1:]])))
        else:
            self.put(operands[0], self.on_integers(name, parts, operands))

    def mov(self, type_: str, operands: list[str], active: Any) -> None:
        target, source = operands
        size = int(type_[1:]) if type_ != "pred" else 1
        if type_ == "pred":
            given = self.registers[source] if source.startswith("%") else np.full(32, int(source, 0) != 0)
            self.put(target, given, active)
        elif target.startswith("{"):
            names = names_in(target)
            for i, name in enumerate(names):
                each = size // len(names)
                self.put(name, (self.get(source, size) >> np.uint64(each * i)) & np.uint64((1 << each) - 1))
        elif source.startswith("{"):
            names = names_in(source)
            each = size // len(names)
            parts = [self.get(name, each) << np.uint64(each * i) for i, name in enumerate(names)]
            self.put(target, np.bitwise_or.reduce(parts))
        else:
            self.put(target, self.get(source, size), active)

    def move(self, parts: list[str], operands: list[str], active: Any) -> None:
        """Loads and stores, of one element or a few."""
        if parts[1] == "param":
            self.put(operands[0], np.full(32, self.values[operands[1].strip("[]")], np.uint64))
            return
        loads, bits = parts[0] == "ld", int(parts[-1][1:])
        names, where = (operands[0], operands[1]) if loads else (operands[1], operands[0])
        size, at = bits // 8, self.address(where)
        store = self.memory.bytes if parts[1] == "global" else self.shared
        registers = names_in(names)
        if parts[1] == "global" and active.any():
            self.memory.check(at[active], size * len(registers), f"{'.'.join(parts)} {operands}")
            assert not (at[active] % (size * len(registers))).any(), f"misaligned: {'.'.join(parts)}"
        for i, register in enumerate(registers):
            places = at[active] + size * i
            if loads:
                value = np.zeros(32, np.uint64)
                for byte in range(size):
                    value[active] |= store[places + byte].astype(np.uint64) << np.uint64(8 * byte)
                self.put(register, value, active)
            else:
                value = self.get(register, 64)[active]
                for byte in range(size):
                    store[places + byte] = (value >> np.uint64(8 * byte)).astype(np.uint8)

    def copy(self, name: str, operands: list[str], active: Any) -> None:
        """``cp.async``: what is copied is there when its group is waited for, and not before."""
        if "commit_group" in name:
            self.copies.append(self.issued)
            self.issued = []
        elif "wait_group" in name:
            while len(self.copies) > int(operands[0], 0):
                for to, data in self.copies.pop(0):
                    self.shared[to : to + len(data)] = data
        else:
            to, of, size = self.address(operands[0]), self.address(operands[1]), int(operands[2], 0)
            taken = self.get(operands[3]).astype(np.int64) if len(operands) > 3 else np.full(32, size)
            for lane in LANES[active]:
                data, count = np.zeros(size, np.uint8), int(taken[lane])
                if count:
                    self.memory.check(of[lane : lane + 1], count, name)
                    assert of[lane] % size == 0, f"misaligned: {name}"
                    data[:count] = self.memory.bytes[of[lane] : of[lane] + count]
                self.issued.append((int(to[lane]), data))

    def multiply(self, operands: list[str]) -> None:
        """``mma.m16n8k16`` of bfloat16, sums in float32."""
        out, left, right, start = map(names_in, operands)
        row, pair = LANES >> 2, (LANES & 3) * 2
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for i, name in enumerate(left):
            r, k = row + 8 * (i & 1), pair + 8 * (i >> 1)
            a[r, k], a[r, k + 1] = of_bfloat16(self.get(name)), of_bfloat16(self.get(name) >> np.uint64(16))
        for i, name in enumerate(right):
            k = pair + 8 * i
            b[k, row], b[k + 1, row] = (
                of_bfloat16(self.get(name)),
                of_bfloat16(self.get(name) >> np.uint64(16)),
            )
        for i, name in enumerate(start):
            c[row + 8 * (i >> 1), pair + (i & 1)] = self.number(name)
        d = (a @ b + c).astype(np.float32)
        for i, name in enumerate(out):
            self.put(name, bits_of(d[row + 8 * (i >> 1), pair + (i & 1)]))

    def matrix(self, parts: list[str], operands: list[str]) -> None:
        """``ldmatrix`` and ``stmatrix`` of 8 x 8 halves; lane l gives the address of row l & 7 of matrix l >> 3."""
        loads, turned = parts[0] == "ldmatrix", "trans" in parts
        names, where = (operands[0], operands[1]) if loads else (operands[1], operands[0])
        at, row, pair = self.address(where), LANES >> 2, (LANES & 3) * 2
        for i, name in enumerate(names_in(names)):
            places = at[8 * i : 8 * i + 8]
            if loads:
                m = np.stack([self.shared[p : p + 16].view(np.uint16) for p in places]).astype(np.uint64)
                m = m.T if turned else m
                self.put(name, m[row, pair] | m[row, pair + 1] << np.uint64(16))
            else:
                m = np.zeros((8, 8), np.uint16)
                m[row, pair] = self.get(name, 16)
                m[row, pair + 1] = self.get(name) >> np.uint64(16)
                for p, line in zip(places, m.T.copy() if turned else m, strict=True):
                    self.shared[p : p + 16] = line.view(np.uint8)

    def converted(self, parts: list[str], operands: list[str]) -> Any:
        to, of = parts[-2], parts[-1]
        if (to, of) == ("f32", "bf16"):
            return bits_of(of_bfloat16(self.get(operands[1], 16)))
        if (to, of) == ("bf16", "f32"):
            return to_bfloat16(self.number(operands[1]))
        if to == "bf16x2":
            high, low = to_bfloat16(self.number(operands[1])), to_bfloat16(self.number(operands[2]))
            return high << np.uint64(16) | low
        if of == "s32":
            return self.signed(operands[1], 32).view(np.uint64)
        if to[0] == "u" and of[0] == "u":
            return self.get(operands[1], min(int(to[1:]), int(of[1:])))
        raise NotImplementedError(".".join(parts))

    def compared(self, how: str, type_: str, operands: list[str]) -> Any:
        if type_ == "f32":
            x, y = self.number(operands[1]), self.number(operands[2])
        elif type_[0] == "s":
            x, y = (self.signed(o, int(type_[1:])) for o in operands[1:3])
        else:
            x, y = (self.get(o, int(type_[1:])) for o in operands[1:3])
        return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[how]

    def on_floats(self, kind: str, x: list[Any]) -> Any:
        wide = [v.astype(np.float64) for v in x]
        with np.errstate(all="ignore"):
            if kind in ("add", "sub", "mul", "div"):
                operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[kind]
                return operation(*x)
            if kind == "fma":
                return wide[0] * wide[1] + wide[2]
            if kind in ("max", "min"):
                return np.fmax(*x) if kind == "max" else np.fmin(*x)
            one = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2, "sqrt": np.sqrt, "rcp": np.reciprocal}
            return one[kind](wide[0])

    def on_integers(self, name: str, parts: list[str], operands: list[str]) -> Any:
        kind, type_ = parts[0], parts[-1]
        if kind in ("abs", "neg") and type_ == "bf16x2":
            x = self.get(operands[1])
            return x & np.uint64(0x7FFF7FFF) if kind == "abs" else x ^ np.uint64(0x80008000)
        bits = int(re.sub(r"\D", "", type_))
        mask = np.uint64((1 << bits) - 1)
        x = self.get(operands[1], bits)
        y = self.get(operands[2], bits) if len(operands) > 2 else x
        if kind in ("and", "or", "xor", "not"):
            return {"and": x & y, "or": x | y, "xor": x ^ y, "not": ~x}[kind] & mask
        if kind == "shl":
            return (x << self.get(operands[2])) & mask
        if kind == "shr":
            count = self.get(operands[2])
            if type_[0] == "s":
                return (self.signed(operands[1], bits) >> count.astype(np.int64)).view(np.uint64) & mask
            return x >> count
        if kind == "prmt":
            both, found = self.get(operands[1]) | self.get(operands[2]) << np.uint64(32), np.uint64(0)
            for i in range(4):
                byte = (self.get(operands[3]) >> np.uint64(4 * i)) & np.uint64(7)
                found = found | ((both >> byte * np.uint64(8)) & np.uint64(255)) << np.uint64(8 * i)
            return found
        if kind == "bfe":
            width = self.get(operands[3])
            inside = (np.uint64(1) << width) - np.uint64(1)
            found = (x >> y) & inside
            negative = (found >> (width - np.uint64(1))) & np.uint64(1)
            return np.where((type_[0] == "s") & (negative == 1), found | ~inside, found) & mask
        if kind in ("add", "sub", "mul", "mad", "div", "rem", "neg", "max", "min"):
            signed, wide = type_[0] == "s", "wide" in parts
            a = self.signed(operands[1], bits) if signed else x.view(np.int64)
            b = a if len(operands) < 3 else self.signed(operands[2], bits) if signed else y.view(np.int64)
            c = self.signed(operands[3], 64 if wide else bits) if kind == "mad" else 0
            with np.errstate(over="ignore"):
                found = {
                    "add": lambda: a + b,
                    "sub": lambda: a - b,
                    "mul": lambda: a * b,
                    "mad": lambda: a * b + c,
                    "div": lambda: np.trunc(a / b).astype(np.int64),
                    "rem": lambda: np.fmod(a, b),
                    "neg": lambda: -a,
                    "max": lambda: np.maximum(a, b),
                    "min": lambda: np.minimum(a, b),
                }[kind]().view(np.uint64)
            return found if wide else found & mask
        raise NotImplementedError(f"{name} {operands}")


def names_in(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def execute(
    text: str, values: Sequence[int], blocks: int, warps: int, memory: Memory, *, backwards: bool = False
) -> None:
    """All blocks of a launch. ``values``: of the parameters (those that are left are zero). ``backwards``: the last warp goes first."""
    program = Program.of(text)
    given = dict(zip(program.parameters, [*values, *[0] * len(program.parameters)], strict=False))
    for block in range(blocks):
        shared = np.full(1 << 18, 0xFF, np.uint8)
        running = [Warp(program, memory, shared, given, block, number).run() for number in range(warps)]
        if backwards:
            running.reverse()
        while running:
            running = [warp for warp in running if next(warp, "over") is None]
