"""What every mixer offers: found by its file's name, options that are checked, a state of named tensors, what it costs."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

from laws.laws import close, identical, identical_state
from laws.mixer_cases import D_MODEL, build, mixer_params, variants
from linstate import mixers
from linstate.errors import ConfigError
from linstate.mixers import Mixer
from linstate.mixers.base import divide
from linstate.mixers.keyed_window import KeyedWindow
from linstate.models import feed_forward
from linstate.types import state_bytes

EVERY = pytest.mark.parametrize("name", mixers.names())


def test_one_file_for_each_mixer() -> None:
    folder = Path(inspect.getfile(mixers)).parent
    parts = {"__init__", "base", "parts"}
    files = {path.stem for path in folder.glob("*.py")} - parts
    assert {name for name in files if not name.startswith("_")} == set(mixers.names())
    assert list(mixers.names()) == sorted(mixers.names()) and "gated_deltanet" in mixers.names()


@EVERY
def test_a_mixer_says_what_it_is(name: str) -> None:
    kind = mixers.find(name)
    assert issubclass(kind, Mixer) and kind.__module__ == f"linstate.mixers.{name}"
    assert "_t" in kind.equation, f"{name}: {kind.equation!r} is no recurrence"
    assert any(character.isdigit() for character in kind.source), f"{name}: {kind.source!r} has no year"
    text = inspect.getmodule(kind).__doc__ or ""
    assert "Source:" in text and "arXiv" in text, f"{name}: the module does not cite its paper"
    assert kind.composition in ("exact", "approximate", "refused")
    assert kind.feed_forward in feed_forward.KINDS


def test_a_name_that_does_not_exist() -> None:
    for wrong in ("mamba17", "base", "parts", "", "_delta", "gated_deltanet.py"):
        with pytest.raises(ConfigError, match=rf"there is no mixer '{wrong}'; there are: .*gated_deltanet"):
            mixers.find(wrong)


def test_a_file_with_two_mixers_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found in a folder that is added to the package for this test."""
    first = "from linstate.mixers.gated_deltanet import GatedDeltaNet\nclass A(GatedDeltaNet): pass\n"
    (tmp_path / "toy_one.py").write_text(first)
    (tmp_path / "toy_two.py").write_text(first + "class B(GatedDeltaNet): pass\n")
    (tmp_path / "toy_none.py").write_text("from linstate.mixers.gated_deltanet import GatedDeltaNet\n")
    (tmp_path / "_toy_part.py").write_text("")
    monkeypatch.setattr(mixers, "__path__", [*mixers.__path__, str(tmp_path)])
    mixers.names.cache_clear()
    try:
        assert {"toy_one", "toy_two", "toy_none"} <= set(mixers.names()) and "_toy_part" not in mixers.names()
        assert mixers.find("toy_one").__name__ == "A"
        for name, count in (("toy_two", 2), ("toy_none", 0)):
            with pytest.raises(
                ConfigError, match=rf"mixers/{name}\.py must define exactly one concrete Mixer, found {count}"
            ):
                mixers.find(name)
    finally:
        monkeypatch.undo()
        mixers.names.cache_clear()
        mixers.find.cache_clear()
        for name in [name for name in sys.modules if ".toy_" in name]:
            del sys.modules[name]


@EVERY
def test_options_have_defaults_and_unknown_ones_are_refused(name: str) -> None:
    kind = mixers.find(name)
    options = kind.options()
    assert "d_model" not in options and "place" not in options and "self" not in options
    assert all(default is not inspect.Parameter.empty for default in options.values()), f"{name}: {options}"
    kind.build(name, D_MODEL, options)
    with pytest.raises(ConfigError, match=rf"mixer '{name}' has no option 'heads_per_mile'; it has: .*"):
        kind.build(name, D_MODEL, {**options, "heads_per_mile": 3})
    with pytest.raises(ConfigError) as error:
        kind.build(name, D_MODEL, {"x": 1})
    assert all(option in str(error.value) for option in options), "the error names every option there is"


def test_parts_that_do_not_divide() -> None:
    assert divide(12, 3, "heads") == 4
    for parts in (5, 0, -1):
        with pytest.raises(ConfigError, match=f"heads: 12 cannot be divided into {parts} equal parts"):
            divide(12, parts, "heads")


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_the_state_is_flat_named_and_batch_first(name: str, variant: str) -> None:
    mixer = build(name, variants(name)[variant], torch.float32)
    for batch in (1, 3):
        empty = mixer.init_state(batch)
        y, after = mixer(torch.ones(batch, 5, D_MODEL), empty)
        assert y.shape == (batch, 5, D_MODEL)
        assert list(after) == list(empty), (
            f"{name}: the state after has other names: {list(after)}, {list(empty)}"
        )
        for key, tensor in after.items():
            assert isinstance(key, str) and key.isidentifier(), f"{name}: {key!r}"
            assert tensor.shape[0] == batch and tensor.dtype == empty[key].dtype, f"{name}: {key}"
        assert all(not t.count_nonzero() for t in empty.values()), f"{name}: the empty state is not zero"
    assert {*mixer.summed, *mixer.joined} & set(after) or mixer.composition == "refused", (
        f"{name}: nothing of its state adds up"
    )


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_no_state_is_the_empty_state(name: str, variant: str) -> None:
    mixer = build(name, variants(name)[variant])
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (y, after), (again, state) = mixer(x), mixer(x, mixer.init_state(2))
    identical(y, again, f"{name}: output")
    identical_state(after, state, name)
    y, after = mixer(torch.cat([x[:1], x[1:]], 1), cu_seqlens=torch.tensor([0, 9, 18]))
    again, state = mixer(
        torch.cat([x[:1], x[1:]], 1), mixer.init_state(2), cu_seqlens=torch.tensor([0, 9, 18])
    )
    identical(y, again, f"{name}, packed: output")
    identical_state(after, state, f"{name}, packed")


@pytest.mark.parametrize(("name", "variant"), mixer_params())
def test_what_it_costs(name: str, variant: str) -> None:
    mixer = build(name, variants(name)[variant], torch.float32)
    assert mixer.state_bytes(0) == state_bytes(mixer.init_state(1)), name
    weights = sum(p.numel() for p in mixer.parameters() if p.dim() > 1)
    one, ten = mixer.flops(1), mixer.flops(10)
    assert mixer.recurrence_flops(0) == 0 and mixer.recurrence_flops(1) > 0, name
    assert one == 2 * weights + mixer.recurrence_flops(1) and ten >= 10 * one, name


@EVERY
def test_the_empty_state_can_be_made_elsewhere(name: str) -> None:
    mixer = build(name, {}, torch.float32)
    assert {t.device.type for t in mixer.init_state(2, device="meta").values()} == {"meta"}
    assert {t.device.type for t in mixer.init_state(2).values()} == {"cpu"}


@EVERY
def test_every_weight_gets_a_gradient(name: str) -> None:
    """A weight without one is a weight that nothing uses."""
    mixer = build(name, variants(name).get("several heads", {})).requires_grad_()
    x = torch.randn(2, 12, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, _ = mixer(x)
    y.square().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name}: {key} has no gradient"


@EVERY
def test_weights_are_all_there_is(name: str) -> None:
    """A copy of the weights into a new mixer gives the same numbers: nothing is kept beside them."""
    first = build(name, {})
    torch.manual_seed(99)
    second = mixers.find(name).build(name, D_MODEL, {}).double().eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 5, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close(second(x)[0], first(x)[0], 1e-12, name)


def test_windows_are_joined() -> None:
    """The window of two texts holds both, as one window that read both does, but for the keys of the second text's first tokens."""
    torch.manual_seed(0)
    mixer = KeyedWindow(16, window=12, num_heads=2, head_dim=8).double()
    first, later = torch.randn(2, 5, 16).double(), torch.randn(2, 9, 16).double()
    _, a = mixer(first)
    _, b = mixer(later)
    _, both = mixer(later, a)
    made = KeyedWindow.add(a, b)
    assert made["length"].tolist() == both["length"].tolist() == [11, 11]
    assert made["k"].shape == both["k"].shape
    torch.testing.assert_close(made["v"], both["v"])
    torch.testing.assert_close(made["k"][:, :2], a["k"][:, -2:])
