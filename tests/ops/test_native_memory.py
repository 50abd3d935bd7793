"""Memory of states and weights: given out again only when nobody looks at it any more."""

from __future__ import annotations

import pytest
import torch

from linstate.ops import native
from linstate.ops.native import memory as native_memory

pytestmark = pytest.mark.skipif(not native.available, reason="no native extension")


def test_a_states_memory_is_given_out_again_when_its_last_view_goes() -> None:
    numbers = native_memory.LARGE // 4 + 123
    first = native_memory.for_states(numbers)
    first.fill_(1.0)
    view, at = first[100:200].view(10, 10), first.data_ptr()
    del first
    other = native_memory.for_states(numbers)
    assert other.data_ptr() != at
    other.fill_(2.0)
    assert bool((view == 1.0).all())
    del view
    assert native_memory.for_states(numbers).data_ptr() == at


def test_weights_lie_beside_each_other_and_apart() -> None:
    made = [native_memory.for_weights((3, 5), torch.bfloat16), native_memory.for_weights((7,), torch.int32)]
    made += [
        native_memory.for_weights((1 << 22, 5), torch.uint8),
        native_memory.for_weights((1000,), torch.float32),
    ]
    for i, t in enumerate(made):
        assert t.data_ptr() % 64 == 0
        t.fill_(i + 1)
    assert [float(t.min()) for t in made] == [float(t.max()) for t in made] == [1.0, 2.0, 3.0, 4.0]
