"""``patch_transformers`` on every family: the same answers, ours called, pieces equal the whole, gradients, undone."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="extra 'hf' is not installed")

from linstate.errors import ArgumentError
from linstate.patch import functions, methods, patch_transformers
from patch.families import FAMILIES, build, modeling, read, tokens

pytestmark = pytest.mark.oracle

BOUND = 2e-5
"""Relative to the largest logit; between two orders of the same float32 sums through a few layers."""

GOES_WRONG = {
    "mamba",
    "falcon_mamba",
    "jamba",
    "zamba",
    "bamba",
    "nemotron_h",
    "zamba2",
    "minimax",
    "recurrent_gemma",
    "rwkv",
}
"""Families of transformers 5.23 whose pieces are not the whole (``docs/transformers.md``)."""

READS_PADDING = {"recurrent_gemma", "rwkv", "xlstm"}
"""Families of transformers 5.23 that read what the mask says is padding."""

ROUTED = {"qwen3_next", "qwen3_5_moe", "kimi_linear", "bailing_hybrid"}
"""Families with so many experts here that one rounding sends a token to others."""

families = pytest.mark.parametrize("family", FAMILIES)


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def in_pieces(model: Any, ids: Tensor, cuts: tuple[int, ...], **more: Any) -> Tensor:
    """Logits of a text read in pieces, each from the cache that the one before left."""
    cache, logits = None, []
    for begin, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        part, cache = read(model, ids[:, begin:end], cache, **more)
        logits.append(part)
    return torch.cat(logits, dim=1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each stand-in and each mended method was called."""
    calls: dict[str, int] = {}

    def count(name: str, run: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return run(*args, **kwargs)

        return call

    for name, stand_in in functions.FUNCTIONS.items():
        run = count(name, stand_in.run)
        run.__wrapped__ = stand_in.run  # the signature is asked for
        monkeypatch.setitem(functions.FUNCTIONS, name, replace(stand_in, run=run))
    for family, mends in methods.METHODS.items():
        counting = tuple(
            replace(mend, make=lambda original, mend=mend: count(mend.owner, mend.make(original)))
            for mend in mends
        )
        monkeypatch.setitem(methods.METHODS, family, counting)
    yield calls


@families
@torch.no_grad()
def test_same_answers_and_ours_gives_them(family: str, counted: dict[str, int]) -> None:
    """A model built before: prefill is theirs; greedy text is what their whole-sequence forward says, one token after another."""
    model, ids = build(family), tokens()
    expected, _ = read(model, ids)
    text = ids
    for _ in range(4):
        text = torch.cat([text, read(model, text)[0][:, -1:].argmax(-1)], dim=1)
    with patch_transformers(quiet=True) as patch:
        assert any(change.module.endswith(f".modeling_{family}") for change in patch)
        found, _ = read(model, ids)
        prefill = dict(counted)
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert off(found, expected) < BOUND
    assert torch.equal(generated, text)
    mine = {c.name.split(".")[0] for c in patch_names(family)} - {"mamba_inner_fn", "RwkvForCausalLM"}
    assert prefill, "nothing of ours was called"
    steps = {name for name in mine if name.endswith("_update") or "recurrent" in name}
    fused = {name for name in mine if "split" in name}
    assert not (mine - steps - fused) - set(prefill), "these were never called in prefill"
    assert not steps - set(counted), "these were never called in decoding"


def patch_names(family: str) -> list[Any]:
    with patch_transformers(quiet=True) as patch:
        return [change for change in patch if change.module.endswith(f".modeling_{family}")]


@families
@torch.no_grad()
def test_pieces_are_the_whole(family: str) -> None:
    """A model built after patching, at cuts that leave several tokens and one; theirs is seen to be off where it is."""
    ids, cuts = tokens(), (9, 16, 17, 18, 19, 20)
    with patch_transformers(quiet=True):
        model = build(family)
        found = in_pieces(model, ids, cuts)
    expected, _ = read(model, ids)
    assert off(found, expected) < BOUND
    pieces = in_pieces(model, ids, cuts)  # of another shape where RWKV mixes its rows up
    theirs = off(pieces, expected) if pieces.shape == expected.shape else float("inf")
    assert (theirs > 50 * BOUND) == (family in GOES_WRONG), f"theirs is off by {theirs:.1e}"


@families
@torch.no_grad()
def test_left_padding_changes_nothing(family: str) -> None:
    """A row of 6 tokens behind 5 of padding, beside one of 11: as alone; then two tokens more."""
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    ids[0, :5] = 0
    with patch_transformers(quiet=True):
        model = build(family)
        alone, _ = read(model, ids[:1, 5:])
        whole, _ = read(model, ids[1:])
        found, cache = read(model, ids[:, :11], attention_mask=mask[:, :11])
        one, cache = read(model, ids[:, 11:12], cache, attention_mask=mask[:, :12])
        two, _ = read(model, ids[:, 12:], cache, attention_mask=mask)
    found = torch.cat([found, one, two], dim=1)
    assert off(found[1:], whole) < BOUND
    assert off(found[:1, 5:], alone) < BOUND
    if family in READS_PADDING:
        theirs, _ = read(model, ids[:, :11], attention_mask=mask[:, :11])
        assert off(theirs[:1, 5:], alone[:, :6]) > 50 * BOUND, "theirs is right now: take it off the list"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"rwkv", "xlstm"}))
@torch.no_grad()
def test_beams_take_their_states_with_them(family: str) -> None:
    """After ``reorder_cache`` both rows go on as the second; RWKV's list and xLSTM's cache have no such method."""
    ids = tokens()
    with patch_transformers(quiet=True):
        model = build(family)
        _, cache = read(model, ids[:, :15])
        expected, _ = read(model, ids[1:, 15:], read(model, ids[1:, :15])[1])
        cache.reorder_cache(torch.tensor([1, 1]))
        found, _ = read(model, ids[1:, 15:].expand(2, -1), cache)
    assert off(found, expected.expand(2, -1, -1)) < BOUND


@families
def test_training(family: str) -> None:
    """Loss and gradients of every weight are theirs."""
    model, ids = build(family).train(), tokens()
    if family == "rwkv":
        model.config.use_cache = False
    with torch.enable_grad():
        expected = gradients(model, ids)
        with patch_transformers(quiet=True):
            found = gradients(model, ids)
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * max(gradient.abs().max(), 1e-2 * largest), name


def gradients(model: Any, ids: Tensor, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False, **more).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["mamba", "qwen3_5", "recurrent_gemma", "bamba"])
def test_training_with_gradient_checkpointing(family: str) -> None:
    """What a layer is handed beside its arguments is there again when it is run for the second time."""
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    with patch_transformers(quiet=True):
        model = build(family).train()
        expected = gradients(model, ids, attention_mask=mask)
        model.activation_checkpointing_enable()
        found = gradients(model, ids, attention_mask=mask)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_rwkv_refuses_what_it_cannot_recompute() -> None:
    ids, mask = tokens(), torch.ones(2, 21, dtype=torch.long)
    with patch_transformers(quiet=True):
        model = build("rwkv").train()
        model.activation_checkpointing_enable()
        mask[0, -5:] = 0
        gradients(model, ids, attention_mask=mask)
        mask[0, :5] = 0
        with pytest.raises(ArgumentError, match="pad on the right"):
            gradients(model, ids, attention_mask=mask)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - ROUTED))
@torch.no_grad()
def test_in_bfloat16_as_exact_as_theirs(family: str) -> None:
    """In pieces, against their float32 forward over the whole."""
    ids = tokens()
    exact, _ = read(build(family), ids)
    model = build(family).bfloat16()
    theirs, _ = read(model, ids)
    with patch_transformers(quiet=True):
        ours = in_pieces(model, ids, (9, 16, 17, 18, 19, 20))

    def error(logits: Tensor) -> float:
        return ((logits.float() - exact).square().mean() / exact.square().mean()).sqrt().item()

    assert 0 < error(ours) < 1.25 * error(theirs) + 2e-3


def everything() -> dict[tuple[str, str], Any]:
    """Every global of the modeling files and every attribute of the classes that are mended."""
    found = {}
    for family in FAMILIES:
        module = modeling(family)
        found |= {(family, name): value for name, value in vars(module).items()}
        for mend in methods.METHODS.get(family, ()):
            found |= {(mend.owner, name): value for name, value in vars(getattr(module, mend.owner)).items()}
    return found


def test_undone_is_as_before() -> None:
    before = everything()
    finders = list(sys.meta_path)
    patch = patch_transformers(quiet=True)
    changed = [key for key, value in everything().items() if value is not before.get(key)]
    assert len(changed) == len([c for c in patch if c.module.split(".")[2] in FAMILIES])
    assert not patch.left_alone
    again = patch_transformers(quiet=True)
    assert len(again) == 0, "what is ours stays"
    again.unpatch()
    patch.unpatch()
    patch.unpatch()
    after = everything()
    assert after.keys() == before.keys()
    assert all(value is before[key] for key, value in after.items())
    assert sys.meta_path == finders


def test_it_says_what_it_changed(capsys: pytest.CaptureFixture[str]) -> None:
    modeling("mamba")
    with patch_transformers() as patch:
        said = capsys.readouterr().out
        assert "mamba_selective_scan" in said and "MambaMixer.forward: a call that goes on" in said
        assert "mamba" in patch.families and str(patch) == said.rstrip("\n")
    assert "as it was" in str(patch)


def test_files_imported_later_are_patched() -> None:
    name = "transformers.models.lfm2_moe.modeling_lfm2_moe"
    before = sys.modules.pop(name, None)
    try:
        with patch_transformers(quiet=True) as patch:
            module = importlib.import_module(name)
            ours = [change.name for change in patch if change.module == name]
            assert sorted(ours) == ["causal_conv1d_fn", "causal_conv1d_update"]
            assert type(module.__loader__).__module__ == type(module.__spec__.loader).__module__  # type: ignore[union-attr]
            assert "linstate" not in type(module.__spec__.loader).__module__  # type: ignore[union-attr]
        assert not hasattr(module.causal_conv1d_fn, "__linstate__")
    finally:
        if before is not None:
            sys.modules[name] = before


@torch.no_grad()
def test_other_devices_and_compilers_get_theirs(
    counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("mamba"), tokens()
    expected, _ = read(model, ids)
    with patch_transformers(devices=["cuda"], quiet=True):
        assert torch.equal(read(model, ids)[0], expected)
    with patch_transformers(quiet=True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert off(read(model, ids)[0], expected) < BOUND  # theirs has another scan for compilers
        with pytest.raises(ArgumentError, match=r"torch\.compile"):
            modeling("mamba").causal_conv1d_fn(
                torch.ones(1, 2, 3), torch.ones(2, 4), seq_idx=torch.zeros(1, 3)
            )
    assert not counted
    with pytest.raises(ArgumentError, match="at least one kind of device"):
        patch_transformers(devices=[])


def test_a_function_that_is_another_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = modeling("lfm2")

    def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor, dilation: int) -> None: ...

    monkeypatch.setattr(module, "causal_conv1d_fn", causal_conv1d_fn)
    with patch_transformers(quiet=True) as patch:
        assert module.causal_conv1d_fn is causal_conv1d_fn
        assert [(c.name, "dilation" in c.mends) for c in patch.left_alone] == [("causal_conv1d_fn", True)]


def test_every_family_of_this_version_is_known() -> None:
    """From the sources of all modeling files: each function of a name we know takes what ours takes, each class is there."""
    import transformers

    seen: dict[str, set[str]] = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text("utf-8")
        family = path.parent.name
        if (
            not any(f"\ndef {name}(" in text for name in functions.FUNCTIONS)
            and family not in methods.METHODS
        ):
            continue
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in functions.FUNCTIONS:
                seen.setdefault(family, set()).add(node.name)
                run = functions.FUNCTIONS[node.name].run
                taken = inspect.signature(run).parameters
                if run is not functions.fused:
                    assert {a.arg for a in node.args.args} <= set(taken), f"{family}: {node.name}"
        classes = {
            node.name: {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
        }
        for mend in methods.METHODS.get(family, ()):
            inherited = mend.name in ("get_seq_length", "get_mask_sizes", "reorder_cache")
            assert inherited or mend.name in classes[mend.owner], f"{family}: {mend.owner}.{mend.name}"
            seen.setdefault(family, set()).add(mend.owner)
    assert set(FAMILIES) <= set(seen) and len(seen) >= 27
    assert set(methods.METHODS) <= set(seen)


PACKED = {
    "delta rule": lambda *t, **k: functions.gated_delta_rule(
        t[0], t[1], t[2], -t[3].abs(), t[3].sigmoid(), use_qk_l2norm_in_kernel=True, **k
    )[0],
    "mamba2": lambda *t, **k: functions.mamba2_chunk_scan(
        t[2],
        t[3],
        -torch.ones(4),
        t[0],
        t[1],
        8,
        dt_softplus=True,
        **({"seq_idx": k["seq_idx"]} if k else {}),
    ),
    "convolution": lambda *t, **k: functions.causal_conv1d_fn(
        t[2].flatten(2).transpose(1, 2),
        torch.ones(24, 4),
        activation="silu",
        **({"seq_idx": k["seq_idx"]} if k else {}),
    ).transpose(1, 2),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_do_not_meet(name: str) -> None:
    torch.manual_seed(0)
    call, lengths = PACKED[name], [5, 1, 9]
    inputs = [torch.randn(1, 15, *size) for size in ((2, 8), (2, 8), (4, 6), (4,))]
    index = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    bounds = torch.tensor([0, 5, 6, 15])
    found = call(*inputs, seq_idx=index, cu_seqlens=bounds)
    expected = [call(*part) for part in zip(*(t.split(lengths, dim=1) for t in inputs), strict=True)]
    assert off(found, torch.cat(expected, dim=1)) < BOUND
    assert off(call(*inputs), torch.cat(expected, dim=1)) > 1e-2
    with pytest.raises(ArgumentError, match=r"packed|B must be 1"):
        call(*(t.expand(2, *t.shape[1:]) for t in inputs), seq_idx=index.expand(2, -1), cu_seqlens=bounds)


@pytest.mark.slow
def test_with_fla_and_without_a_gpu() -> None:
    """In a process that sees FLA and triton, their model fails without a GPU, and runs once it is patched."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: FLA's kernels run")
    for package in ("fla", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra 'oracles')")
    script = """
        import importlib, sys, torch
        import fla
        from patch import families
        families.modeling = lambda family: importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        import linstate
        for family in ("qwen3_next", "kimi_linear"):
            model, ids = families.build(family), families.tokens()
            try:
                families.read(model, ids)
            except RuntimeError as error:
                assert "0 active drivers" in str(error), error
            else:
                raise SystemExit(f"{family} ran without being patched: nothing is tried")
            with torch.no_grad(), linstate.patch_transformers(quiet=True):
                print(families.read(model, ids)[0].isfinite().all().item())
                print(model.generate(ids, max_new_tokens=2, do_sample=False).shape[1])
    """
    here = importlib.util.find_spec("patch.families").origin.rsplit("/", 2)[0]  # type: ignore[union-attr]
    script = f"import sys; sys.path.insert(0, {here!r})\n" + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "23"] * 2
