"""Mixers side by side: the sum of their outputs, a state with the tensors of each, composed as each of them is."""

from __future__ import annotations

import pytest
import torch

import small_models
from laws.laws import close, identical
from laws.mixer_cases import D_MODEL, VOCABULARY, random_tokens, randomise
from linstate import Decoder, LanguageModel, ModelConfig, mixers
from linstate.errors import CompositionError, ConfigError
from linstate.mixers import Mixer

NAME = "gated_deltanet+sliding_window"


def build(name: str, **options: object) -> Mixer:
    torch.manual_seed(0)
    return randomise(mixers.find(name).build(name, D_MODEL, options)).double().requires_grad_(False)  # type: ignore[return-value]


def test_it_is_the_sum_of_its_mixers() -> None:
    both = build(NAME, scales=(0.5, -2.0), sliding_window={"window": 9})
    x = torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, state = both(x)
    delta, window = (both.get_submodule(f"parts.{name}") for name in mixers.split(NAME))
    (first, of_first), (second, of_second) = delta(x), window(x)
    close(y, 0.5 * first - 2.0 * second, 1e-12, "output")
    expected = {f"gated_deltanet.{k}": t for k, t in of_first.items()}
    expected |= {f"sliding_window.{k}": t for k, t in of_second.items()}
    assert list(state) == list(expected) == list(both.init_state(1))
    for name, tensor in expected.items():
        identical(state[name], tensor, name)
    assert both.state_bytes(100) == delta.state_bytes(100) + window.state_bytes(100)
    assert both.flops(10) == delta.flops(10) + window.flops(10)
    assert state["sliding_window.k"].shape[1] == 8, "an option went to its mixer"


def test_it_says_what_it_is() -> None:
    kind = mixers.find(NAME)
    assert kind is mixers.find(NAME) and issubclass(kind, Mixer) and NAME not in mixers.names()
    assert mixers.split(NAME) == ("gated_deltanet", "sliding_window") and mixers.split("gla") == ("gla",)
    assert kind.options() == {"gated_deltanet": {}, "sliding_window": {}, "scales": None}
    assert (
        kind.composition == "refused" and mixers.find("gla+linear_transformer").composition == "approximate"
    )
    assert mixers.find("rwkv7+gla").feed_forward == "rwkv7_channel_mix"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gla+gla", {}, r"a mixer cannot stand beside itself: 'gla\+gla'"),
        ("gla+mamba17", {}, "there is no mixer 'mamba17'"),
        ("gla+", {}, "there is no mixer ''"),
        (NAME, {"window": 3}, r"has no option 'window'; it has: gated_deltanet, sliding_window, scales"),
        (NAME, {"sliding_window": {"wheels": 3}}, "mixer 'sliding_window' has no option 'wheels'"),
        (
            NAME,
            {"scales": (1.0,)},
            "scales must be 2 numbers, one for each of gated_deltanet, sliding_window",
        ),
    ],
)
def test_what_does_not_fit_is_named(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(name, **options)


def test_the_first_of_a_kind_is_found_beside_others() -> None:
    """RWKV-7's first layer makes the values that the others read, wherever it stands."""
    model = Decoder(ModelConfig(VOCABULARY, D_MODEL, ("gla", "gla+rwkv7", "rwkv7", "rwkv7+gla")))
    first = [m.first for m in model.modules() if type(m).__name__ == "RWKV7"]
    assert first == [True, False, False]
    assert model(random_tokens(1, 5))[0].isfinite().all()


def language_model(*pattern: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        Decoder(ModelConfig(300, 32, pattern)), small_models.tokenizer(), name="test", grid=16
    )


def test_composition_adds_what_adds_up() -> None:
    model = language_model("linear_transformer+gated_deltanet", "gla")
    first, second = model.settle(model.read("some text to read")), model.read("and another one")
    composed = first.compose(second)
    assert composed.composition == "approximate"
    for name, tensor in composed.tensors.items():
        later = second.tensors[name]
        expected = first.tensors[name] + later if name.endswith(".S") else later
        identical(tensor, expected, name)
    refusing = language_model(NAME)
    with pytest.raises(CompositionError, match=r"layer 0 \(gated_deltanet\+sliding_window\) keeps keys"):
        refusing.settle(refusing.read("a")).compose(refusing.read("b"))
