"""Rules that many families share: the layouts of transformers for what we call by one name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from linstate.models.families._rules import (
    Concat,
    Groups,
    Order,
    Rule,
    Squeeze,
    Stack,
    Table,
    interleaved,
    rule,
    tied,
)


def used(pattern: Sequence[str], **options: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The options of those mixers and feed-forwards that there are."""
    return {name: given for name, given in options.items() if name in pattern}


def ends(
    tie: bool,
    embedding: str = "model.embed_tokens",
    norm: str = "model.norm",
    head: str = "lm_head",
    *,
    bias: bool = False,
) -> Table:
    """Embedding, last norm (with a ``bias``) and head."""
    embedding = f"{embedding}.weight"
    copy = tied(embedding, f"{head}.weight") if tie else rule(f"{head}.weight", "head.weight")
    return [rule(embedding, "embedding.weight"), *normed(norm, "norm", bias=bias), copy]


def swiglu(
    d_ff: int,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    *,
    bias: bool = False,
) -> list[Rule]:
    """A gated feed-forward of width ``d_ff``."""
    return [
        made
        for kind in (("weight", "bias") if bias else ("weight",))
        for made in (
            rule((f"{gate}.{kind}", f"{up}.{kind}"), f"up.{kind}", Concat(d_ff, d_ff)),
            rule(f"{down}.{kind}", f"down.{kind}"),
        )
    ]


def normed(theirs: str, ours: str, *, bias: bool = False) -> list[Rule]:
    """A norm; with a bias a layer norm or a group norm."""
    return [
        rule(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in (("weight", "bias") if bias else ("weight",))
    ]


def experts(
    found: Collection[str],
    theirs: str,
    count: int,
    d_ff: int,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> list[Rule]:
    """The experts of a mixture, each in tensors of its own, or all in one where ``found`` has those; ``theirs`` is their prefix.

    Their names come out whole, ours without a prefix: put ``under("", ours, ...)`` around it.
    """
    if f"{theirs}.gate_up_proj" in found:
        return [rule(f"{theirs}.gate_up_proj", "up"), rule(f"{theirs}.down_proj", "down")]
    pairs = [f"{theirs}.{e}.{part}.weight" for e in range(count) for part in (gate, up)]
    downs = [f"{theirs}.{e}.{down}.weight" for e in range(count)]
    return [
        rule(pairs, "up", Groups(2, Concat(d_ff, d_ff)), Stack()),
        rule(downs, "down", Stack()),
    ]


def attention(
    options: Mapping[str, Any],
    q: str = "q_proj",
    k: str = "k_proj",
    v: str = "v_proj",
    out: str = "o_proj",
    norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> list[Rule]:
    """A layer of softmax attention with these options of ours.

    With an output gate, q of each head is followed by its gate.
    """
    heads, dim = options["num_heads"], options["head_dim"]
    keys = (options.get("num_kv_heads") or heads) * dim
    gated = options.get("output_gate", False)
    rows = [heads * dim * (2 if gated else 1), keys, keys]
    found = [rule(f"{out}.weight", "out_proj.weight")]
    kinds = ["weight"]
    if options.get("bias"):
        found.append(rule(f"{out}.bias", "out_proj.bias"))
    if options.get("bias") is True:
        kinds.append("bias")
    steps = [Concat(*rows)]
    for kind in kinds:
        order = [_gates_last(heads, dim, 2 * keys)] if gated else []
        found.append(rule([f"{name}.{kind}" for name in (q, k, v)], f"in_proj.{kind}", *steps, *order))
    if options.get("qk_norm"):
        found += [rule(f"{norms[0]}.weight", "q_norm.weight"), rule(f"{norms[1]}.weight", "k_norm.weight")]
    return found


def _gates_last(heads: int, dim: int, between: int) -> Order:
    """Rows q and gate of each head, then others: to all q, the others, all gates."""
    import torch

    first = interleaved([dim, dim], heads).order
    q, gate = first.split(heads * dim)
    rest = torch.arange(between) + 2 * heads * dim
    return Order(torch.cat([q, rest, gate]))


def convolution(theirs: str, ours: str = "conv", *, bias: bool = False) -> list[Rule]:
    """A depthwise convolution, which they keep as ``[D, 1, W]``."""
    found = [rule(f"{theirs}.weight", f"{ours}.weight", Squeeze(1))]
    return [*found, rule(f"{theirs}.bias", f"{ours}.bias")] if bias else found
