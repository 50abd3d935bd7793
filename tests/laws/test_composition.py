"""Law 7: what a text does to a state is one affine map, and the maps of its pieces compose to it."""

from __future__ import annotations

import pytest
import torch

from laws.laws import check_composition, close, exempt
from laws.op_cases import Sizes, accepted, bound_of, cases, kernel, kernels, op_of, rooms
from linstate.errors import ArgumentError
from linstate.ops import Segment, delta_rule, linear_attention, summarise


@pytest.mark.parametrize(
    "name", [n for n in kernels() if n[1] != "step" and not exempt(n[0], "composition")], ids="-".join
)
def test_pieces_compose_to_the_whole(name: tuple[str, str, str]) -> None:
    chunked = name[1] == "chunked"
    for case in accepted(name, Sizes(T=140 if chunked else 12)):
        for cuts in ((64, 100), (30, 129)) if chunked else ((4, 9), (0, 5)):
            check_composition(summarise, kernel(*name), case, cuts, bound_of(case))


@pytest.mark.parametrize("recurrence", [r for r in rooms() if not exempt(r, "composition")])
def test_a_packed_summary_holds_one_map_for_each_sequence(recurrence: str) -> None:
    for case in cases(recurrence, Sizes(B=1)):
        packed = case.summary(summarise, op_of(recurrence), cu_seqlens=torch.tensor([0, 5, 5, 12]))
        for row, (start, end) in enumerate(((0, 5), (5, 5), (5, 12))):
            alone = case.piece(start, end).summary(summarise, op_of(recurrence))
            close(packed.increment[row : row + 1], alone.increment, 1e-9, f"{case}: H of sequence {row}")
            close(packed.transition[row : row + 1], alone.transition, 1e-9, f"{case}: P of sequence {row}")


@pytest.mark.parametrize("recurrence", [r for r in rooms() if exempt(r, "composition")])
def test_what_is_not_affine_is_refused(recurrence: str) -> None:
    case = cases(recurrence, Sizes())[0]
    with pytest.raises(ArgumentError, match=f"{recurrence} has no affine state"):
        summarise(op_of(recurrence), *(3 * [*case.sequences.values()])[:3])


def test_a_summary_is_for_every_initial_state() -> None:
    case = cases("delta_rule", Sizes())[0]
    with pytest.raises(ArgumentError, match="a summary holds for every initial state"):
        summarise(delta_rule, *case.sequences.values(), initial_state=case.initial)


def test_segments_of_two_recurrences_do_not_compose() -> None:
    first, second = (
        case.summary(summarise, op)
        for op, case in ((op, cases(op.__name__, Sizes())[0]) for op in (delta_rule, linear_attention))
    )
    assert isinstance(first, Segment)
    with pytest.raises(ArgumentError, match="different recurrences"):
        first.then(second)
