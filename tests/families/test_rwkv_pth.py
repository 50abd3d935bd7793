"""The authors' files of RWKV-6 and RWKV-7: against a plain loop of their equations, and the same weights in FLA's format.

The files are made here, with the public names and shapes; nobody but the authors' training code writes real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from families.cases import VOCABULARY, Case, Oracle
from linstate import Decoder, LanguageModel
from linstate.engine.world_tokenizer import WorldTokenizer
from linstate.errors import CheckpointError
from linstate.models.checkpoint import load_decoder, read_settings
from linstate.models.families import find
from linstate.models.families._rules import save as inverse
from linstate.models.families._settings import Settings
from oracles import fla_models
from oracles.oracle import agree

LAYERS, WIDE = 3, 96
Weights = dict[str, Tensor]
Mix = Callable[[Weights, str, Tensor, dict[str, Any]], Tensor]


def write(tensors: Any, path: Path) -> None:
    """As the authors do; the project itself never writes such a file."""
    torch.serialization.save(tensors, path)


def common(d: int, rows: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (VOCABULARY, d), "head.weight": (VOCABULARY, d)}
    norms = [
        "ln_out",
        "blocks.0.ln0",
        *(f"blocks.{i}.{n}" for i in range(LAYERS) for n in ("ln1", "ln2", "att.ln_x")),
    ]
    shapes |= {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}
    square = [f"att.{name}.weight" for name in ("receptance", "key", "value", "output")]
    shapes |= {f"blocks.{i}.{name}": (d, d) for i in range(LAYERS) for name in square}
    return shapes | {
        f"blocks.{i}.ffn.{name}.weight": shape
        for i in range(LAYERS)
        for name, shape in (("key", (rows, d)), ("value", (d, rows)))
    }


def shapes_x070(d: int, heads: int) -> dict[str, tuple[int, ...]]:
    found = common(d, WIDE)
    for i in range(LAYERS):
        channels = [*(f"x_{n}" for n in "rwkvag"), "w0", "a0", "k_k", "k_a", *(["v0"] if i else [])]
        found |= {f"blocks.{i}.att.{name}": (1, 1, d) for name in channels}
        for name, rank in (("w", 8), ("a", 6), ("g", 12), *((("v", 4),) if i else ())):
            found |= {f"blocks.{i}.att.{name}1": (d, rank), f"blocks.{i}.att.{name}2": (rank, d)}
        found |= {f"blocks.{i}.att.r_k": (heads, d // heads), f"blocks.{i}.ffn.x_k": (1, 1, d)}
    return found


def shapes_x060(d: int, heads: int) -> dict[str, tuple[int, ...]]:
    found = common(d, WIDE)
    for i in range(LAYERS):
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        found |= {f"{att}time_maa_{n}": (1, 1, d) for n in "xwkvrg"}
        found |= {
            f"{att}time_maa_w1": (d, 5 * 4),
            f"{att}time_maa_w2": (5, 4, d),
            f"{att}gate.weight": (d, d),
        }
        found |= {f"{att}time_decay": (1, 1, d), f"{att}time_decay_w1": (d, 6), f"{att}time_decay_w2": (6, d)}
        found |= {f"{att}time_faaaa": (heads, d // heads), f"{ffn}receptance.weight": (d, d)}
        found |= {f"{ffn}time_maa_k": (1, 1, d), f"{ffn}time_maa_r": (1, 1, d)}
    return found


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        uniform = torch.rand(shape, generator=generator)
        last = name.rsplit(".", 1)[-1]
        if last.startswith(("x_", "time_maa_")) and shape[0] == 1:
            found[name] = uniform
        elif last in ("w0", "time_decay"):
            found[name] = 4 * uniform - 4
        elif last == "weight" and len(shape) == 1:
            found[name] = 0.5 + uniform
        elif len(shape) == 1 or shape[0] == 1:
            found[name] = uniform - 0.3
        else:
            size = 0.25 if name.endswith(("output.weight", "ffn.value.weight")) else 1.0
            rows = (
                shape[-2] if last[-1] in "12" and last != "weight" else shape[-1]
            )  # they multiply from the right
            found[name] = torch.randn(shape, generator=generator) * size * rows**-0.5
    return {**found, "emb.weight": torch.randn(shapes["emb.weight"], generator=generator)}


def norm(z: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], z[f"{name}.weight"], z[f"{name}.bias"], 1e-5)


def model(z: Weights, tokens: Tensor, time_mix: Mix, channel_mix: Mix) -> Tensor:
    """Token by token, ``tokens [T]`` -> logits ``[T, vocabulary]``."""
    states: list[dict[str, Any]] = [{} for _ in range(2 * LAYERS)]
    logits = []
    for token in tokens.tolist():
        x, first = norm(z, "blocks.0.ln0", z["emb.weight"][token]), dict[str, Any]()
        for i in range(LAYERS):
            states[2 * i]["first"] = first
            for kind, mix, state in (
                ("att", time_mix, states[2 * i]),
                ("ffn", channel_mix, states[2 * i + 1]),
            ):
                inner = norm(z, f"blocks.{i}.{'ln1' if kind == 'att' else 'ln2'}", x)
                x = x + mix(z, f"blocks.{i}.{kind}.", inner, state)
                state["x"] = inner
        logits.append(z["head.weight"] @ norm(z, "ln_out", x))
    return torch.stack(logits)


def between(z: Weights, name: str, x: Tensor, state: dict[str, Any]) -> Tensor:
    return x + (state.get("x", torch.zeros_like(x)) - x) * z[name].flatten()


def group_norm(z: Weights, at: str, o: Tensor) -> Tensor:
    flat = o.reshape(1, -1)
    return F.group_norm(flat, len(o), z[f"{at}ln_x.weight"], z[f"{at}ln_x.bias"], 64e-5)[0]


def time_mix_7(z: Weights, at: str, x: Tensor, state: dict[str, Any]) -> Tensor:
    """Section 4 of arXiv 2503.14456; the state is [head, value, key]."""
    r, w, k, v, a, g = (between(z, f"{at}x_{n}", x, state) for n in "rwkvag")
    heads, size = z[f"{at}r_k"].shape
    decay = z[f"{at}w0"].flatten() + (w @ z[f"{at}w1"]).tanh() @ z[f"{at}w2"]
    decay = (-((-F.softplus(-decay) - 0.5).exp())).exp().view(heads, 1, size)
    r, k, value = z[f"{at}receptance.weight"] @ r, z[f"{at}key.weight"] @ k, z[f"{at}value.weight"] @ v
    if f"{at}v0" in z and not at.startswith("blocks.0."):
        rate = (z[f"{at}v0"].flatten() + v @ z[f"{at}v1"] @ z[f"{at}v2"]).sigmoid()
        value = value + (state["first"]["v"] - value) * rate
    else:
        state["first"]["v"] = value
    a = (z[f"{at}a0"].flatten() + a @ z[f"{at}a1"] @ z[f"{at}a2"]).sigmoid()
    g = (g @ z[f"{at}g1"]).sigmoid() @ z[f"{at}g2"]
    kk = F.normalize((k * z[f"{at}k_k"].flatten()).view(heads, size), dim=-1)
    k = k * (1 + (a - 1) * z[f"{at}k_a"].flatten())
    r, k, value, a = (t.view(heads, size) for t in (r, k, value, a))
    s = state.get("s", torch.zeros(heads, size, size))
    removed = torch.einsum("hvk,hk->hv", s, kk)
    state["s"] = s = s * decay - removed[:, :, None] * (kk * a)[:, None] + value[:, :, None] * k[:, None]
    o = group_norm(z, at, torch.einsum("hvk,hk->hv", s, r))
    o = o + ((r * k * z[f"{at}r_k"]).sum(-1, keepdim=True) * value).flatten()
    return z[f"{at}output.weight"] @ (o * g)


def channel_mix_7(z: Weights, at: str, x: Tensor, state: dict[str, Any]) -> Tensor:
    return z[f"{at}value.weight"] @ (z[f"{at}key.weight"] @ between(z, f"{at}x_k", x, state)).relu().square()


def time_mix_6(z: Weights, at: str, x: Tensor, state: dict[str, Any]) -> Tensor:
    """Section 3 of arXiv 2404.05892; the state is [head, key, value]."""
    towards = state.get("x", torch.zeros_like(x)) - x
    heads, size = z[f"{at}time_faaaa"].shape
    low = (between(z, f"{at}time_maa_x", x, state) @ z[f"{at}time_maa_w1"]).tanh().view(5, 1, -1)
    rates = (low @ z[f"{at}time_maa_w2"])[:, 0]
    w, k, v, r, g = (
        x + towards * (z[f"{at}time_maa_{n}"].flatten() + rate)
        for n, rate in zip("wkvrg", rates, strict=True)
    )
    decay = z[f"{at}time_decay"].flatten() + (w @ z[f"{at}time_decay_w1"]).tanh() @ z[f"{at}time_decay_w2"]
    decay = (-decay.exp()).exp().view(heads, size, 1)
    r, k, v = (
        (z[f"{at}{name}.weight"] @ t).view(heads, size)
        for name, t in (("receptance", r), ("key", k), ("value", v))
    )
    s = state.get("s", torch.zeros(heads, size, size))
    new = k[:, :, None] * v[:, None]
    o = torch.einsum("hkv,hk->hv", s + z[f"{at}time_faaaa"][:, :, None] * new, r)
    state["s"] = s * decay + new
    return z[f"{at}output.weight"] @ (group_norm(z, at, o) * F.silu(z[f"{at}gate.weight"] @ g))


def channel_mix_6(z: Weights, at: str, x: Tensor, state: dict[str, Any]) -> Tensor:
    k = (z[f"{at}key.weight"] @ between(z, f"{at}time_maa_k", x, state)).relu().square()
    r = z[f"{at}receptance.weight"] @ between(z, f"{at}time_maa_r", x, state)
    return r.sigmoid() * (z[f"{at}value.weight"] @ k)


def pth(name: str, shapes: dict[str, tuple[int, ...]], time_mix: Mix, channel_mix: Mix) -> Case:
    """A file, and the loop over its equations; in bfloat16 the loop has rounded weights and computes in float32."""

    def save(folder: Path) -> Oracle:
        weights = random_weights(shapes, 0)
        write(weights, folder / "model.pth")

        @torch.no_grad()
        def logits(tokens: Tensor, dtype: torch.dtype) -> Tensor:
            z = {n: t.to(dtype).float() for n, t in weights.items()}
            return torch.stack([model(z, row, time_mix, channel_mix) for row in tokens])

        return logits

    return Case(name, save)


CASES = [
    pth("rwkv_x070", shapes_x070(32, 2), time_mix_7, channel_mix_7),
    pth("rwkv_x060", shapes_x060(32, 2), time_mix_6, channel_mix_6),
]


def in_fla(decoder: Decoder, raw: dict[str, Any], **settings: Any) -> Any:
    """FLA's model with our weights: by the inverse of the table of its format."""
    made = fla_models.model(
        raw["model_type"], **{name: v for name, v in raw.items() if name != "model_type"}, **settings
    )
    family = find(raw, "config")
    table = family.weights(decoder.config, Settings(raw, "config"), {})
    made.load_state_dict(inverse(table, decoder.state_dict()))
    return made


def check_fla(decoder: Decoder, raw: dict[str, Any]) -> None:
    tokens = torch.randint(VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(3))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        fla_models.plain(raw["model_type"], patch)
        expected = in_fla(decoder, raw)(tokens, use_cache=False).logits
        agree("logits", decoder(tokens)[0], expected)


@pytest.mark.oracle
def test_rwkv7_is_the_same_in_flas_format(tmp_path: Path) -> None:
    """With heads of 64, as all models have them: then the eps of FLA's group norm is the authors' 64e-5."""
    write(random_weights(shapes_x070(64, 1), 1), tmp_path / "m.pth")
    decoder = load_decoder(tmp_path, read_settings(tmp_path)).eval()
    ranks = {"decay": 8, "a": 6, "v": 4, "gate": 12}
    raw = {
        "model_type": "rwkv7",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "head_dim": 64,
        "intermediate_size": WIDE,
        **{f"{name}_low_rank_dim": rank for name, rank in ranks.items()},
    }
    check_fla(decoder, raw)


@pytest.mark.oracle
def test_rwkv6_is_the_same_in_flas_format(tmp_path: Path) -> None:
    """FLA has one eps for all norms, the authors another for the group norm: here all have that."""
    write(random_weights(shapes_x060(32, 2), 1), tmp_path / "m.pth")
    own = load_decoder(tmp_path, read_settings(tmp_path))
    decoder = Decoder(replace(own.config, norm_eps=64e-5)).eval()
    decoder.load_state_dict(own.state_dict())
    raw = {
        "model_type": "rwkv6",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_heads": 2,
        "expand_k": 1.0,
        "intermediate_size": WIDE,
        "proj_low_rank_dim": 4,
        "gate_low_rank_dim": 6,
        "norm_eps": 64e-5,
    }
    check_fla(decoder, raw)


def vocabulary() -> str:
    """The bytes, then tokens of two and more, as strings and as bytes."""
    lines = [
        f"{byte + 1} {chr(byte)!r} 1" if byte < 128 else f"{byte + 1} {bytes([byte])!r} 1"
        for byte in range(256)
    ]
    more = ["ab", " ab", "abc", "abcde", "\n\n", "'", "é", "日本", b"\xe6\x97", "cd"]
    for token in more:
        size = len(token.encode() if isinstance(token, str) else token)
        if size > 1:
            lines.append(f"{len(lines) + 1} {token!r} {size}")
    return "\n".join(lines) + "\n"


def test_the_world_tokenizer_takes_the_longest_token() -> None:
    tokenizer = WorldTokenizer(vocabulary(), "v")
    tokens = {line.split(" ")[0]: line for line in vocabulary().splitlines()}
    for text in ("abcd", " abcdeabcd ab", "日本日é'\n\n\nx", "", "\x00\x7f", "ababab\n"):
        ids, data, expected, at = tokenizer.encode(text).ids, text.encode(), [], 0
        while at < len(data):  # the definition: of all tokens that the rest begins with, the longest
            found = [t for t in tokenizer._ids if data[at:].startswith(t)]
            longest = max(found, key=len)
            expected.append(tokenizer._ids[longest])
            at += len(longest)
        assert ids == expected, text
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("abcd").ids) == 2  # abc, d and not ab, cd
    assert tokenizer.get_vocab_size() == len(tokens) + 1
    assert tokenizer.decode([*tokenizer.encode("日").ids[:1]]) == "\ufffd"
    assert tokenizer.decode([0, 98], skip_special_tokens=False) == "<|endoftext|>a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("300 'abc' 2", "line 1: expected an id"),
        ("300 print('x') 3", "line 1: expected an id"),
        ("nothing", "line 1: expected an id"),
        ("1 'q' 1", "comes twice"),
        ("300 'xy' 2", "no token for the byte 0x00"),
    ],
)
def test_a_broken_vocabulary_is_refused(line: str, message: str) -> None:
    rest = "" if "no token" in message else vocabulary()
    with pytest.raises(CheckpointError, match=message):
        WorldTokenizer(f"{line}\n{rest}", "v")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(2)], "holds no tensors by name"),
        ({"a": torch.zeros(2), "b": 3}, "no tensors: b"),
        ({"a": torch.zeros(2)}, "not those of RWKV-6"),
        ({"a": Path("x")}, "cannot be read as tensors by name"),
    ],
)
def test_a_pth_with_other_things_is_refused(tensors: Any, message: str, tmp_path: Path) -> None:
    write(tensors, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=message):
        read_settings(tmp_path / "m.pth")


def test_a_pth_and_its_vocabulary_are_a_model(tmp_path: Path) -> None:
    shapes = shapes_x070(32, 2)
    size = WorldTokenizer(vocabulary(), "v").get_vocab_size()
    shapes |= {"emb.weight": (size, 32), "head.weight": (size, 32)}
    weights = random_weights(shapes, 2)
    write({name: t.bfloat16() for name, t in weights.items()}, tmp_path / "rwkv.pth")
    with pytest.raises(CheckpointError, match="needs its vocabulary there"):
        LanguageModel.from_pretrained(tmp_path / "rwkv.pth")
    (tmp_path / "rwkv_vocab_test.txt").write_text(vocabulary(), "utf-8")
    found = [LanguageModel.from_pretrained(path) for path in (tmp_path, tmp_path / "rwkv.pth")]
    assert found[0].ends == (0,) and found[0].fingerprint == found[1].fingerprint
    state = found[0].read("ab 日本 abcde, é")
    text = found[0].generate(" abc", state, max_tokens=5)
    again = found[1].generate(" abc", found[1].read("ab 日本 abcde, é"), max_tokens=5)
    assert text.ids == again.ids and text.text == again.text
    found[0].save_pretrained(tmp_path / "own")
    own = LanguageModel.from_pretrained(tmp_path / "own")
    assert own.generate(" abc", own.read("ab 日本 abcde, é"), max_tokens=5).ids == text.ids
    del weights["blocks.1.att.k_a"]
    write(weights, tmp_path / "rwkv.pth")
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.att\.k_a"):
        LanguageModel.from_pretrained(tmp_path)
