"""The scheduler: tokens as if alone, to the bit; fairness, cancelling, refusing, and what an error costs."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

import small_models
from linstate import LanguageModel, Sampling, State
from linstate.engine import scheduler as scheduler_module
from linstate.engine import slots
from linstate.engine.generation import Live
from linstate.engine.jobs import Event, Failed, Finished, Reading, Request, Token
from linstate.engine.scheduler import COPIES, Scheduler
from linstate.engine.slots import ROWS
from linstate.engine.tokens import encode
from linstate.errors import BusyError, InputError, StateMismatchError

TEXTS = [small_models.TEXT[13 * i : 13 * i + 30 + 17 * i] for i in range(11)]


def ids_of(model: LanguageModel, text: str) -> tuple[int, ...]:
    return tuple(encode(model.tokenizer, text))


def alone(model: LanguageModel, state: State, count: int, sampling: Sampling) -> tuple[list[int], State]:
    """The tokens that a conversation gets with the model for itself."""
    live = Live(model.decoder, state, ROWS)
    generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + state.position)
    ids = []
    for _ in range(count):
        ids.append(sampling.choose(live.logits(), generator))
        live.add(ids[-1])
    return ids, live.state()


@pytest.mark.parametrize("pattern", ["delta", "hybrid", "keyed"])
def test_a_batch_gives_each_the_tokens_and_the_state_that_it_gets_alone(pattern: str) -> None:
    model = small_models.build(pattern)
    samplings = [Sampling(temperature=0.9 * (i % 2), seed=i) for i in range(len(TEXTS))]
    with Scheduler(model, slots=8) as scheduler:  # fewer than jobs: some join while others are under way
        jobs = [
            scheduler.submit(Request(model.empty_state(), ids_of(model, text), 20 + i, sampling))
            for i, (text, sampling) in enumerate(zip(TEXTS, samplings, strict=True))
        ]
        found = [job.result(60) for job in jobs]
    for i, (text, sampling, result) in enumerate(zip(TEXTS, samplings, found, strict=True)):
        ids, state = alone(model, model.read(text), 20 + i, sampling)
        assert list(result.ids) == ids and result.state.id == state.id
        assert result.text == model.tokenizer.decode(ids, skip_special_tokens=False)


def test_going_on_from_a_saved_middle_is_going_on_uninterrupted(tmp_path: Path) -> None:
    model, text = small_models.build("delta"), TEXTS[4]
    whole, end = alone(model, model.read(text), 40, Sampling())
    with Scheduler(model) as scheduler:
        first = scheduler.submit(Request(model.empty_state(), ids_of(model, text), 9)).result(60)
    first.state.save(tmp_path / "middle.state")
    with Scheduler(model) as scheduler:
        middle = model.load_state(tmp_path / "middle.state")
        second = scheduler.submit(Request(middle, (), 31)).result(60)
    assert [*first.ids, *second.ids] == whole and second.state.id == end.id
    assert middle.calls and middle.rows == ROWS


def test_a_state_of_one_row_is_gone_on_from_in_one_row() -> None:
    model = small_models.build("delta")
    live = Live(model.decoder, model.read(TEXTS[3]))
    whole: list[int] = []
    for step in range(14):
        if step == 5:
            middle = live.state()
        whole.append(int(live.logits().argmax()))
        live.add(whole[-1])
    assert middle.rows == 1
    with Scheduler(model) as scheduler:
        more = scheduler.submit(Request(middle, (), 9)).result(60)
    block = next((n for n in range(9) if not len(more.state.calls)), 9)
    assert list(more.ids)[:block] == whole[5 : 5 + block]


def test_a_new_turn_reads_only_what_is_new() -> None:
    model = small_models.build("delta")
    with Scheduler(model) as scheduler:
        first = scheduler.submit(Request(model.empty_state(), ids_of(model, small_models.TEXT), 5)).result(60)
        more = ids_of(model, " and then?")
        second = scheduler.submit(Request(first.state, more, 3)).result(60)
    assert second.computed - second.tail == len(more) and second.tail < model.grid + 1
    same, _ = alone(model, model.append(more, first.state), 3, Sampling())
    assert list(second.ids) == same


def test_stop_texts_end_it_and_are_never_shown() -> None:
    model = small_models.build("delta")
    with Scheduler(model) as scheduler:
        free = scheduler.submit(Request(model.empty_state(), ids_of(model, TEXTS[2]), 30)).result(60)
        mark = free.text[7:10]
        job = scheduler.submit(Request(model.empty_state(), ids_of(model, TEXTS[2]), 30, stop=(mark, "\0")))
        events = list(job.wait(60))
    last = events[-1]
    assert isinstance(last, Finished) and last.reason == "stop"
    assert last.text == free.text[: free.text.index(mark)]
    assert "".join(e.text for e in events if isinstance(e, Token)) + last.rest == last.text
    assert len(last.ids) < len(free.ids)


def test_a_long_text_holds_nobody_up() -> None:
    model = small_models.build("delta")
    order: list[str] = []
    with Scheduler(model, deliver=lambda events: order.extend(name(job) for job, _ in events)) as scheduler:
        names = {}

        def name(job: object) -> str:
            return names.get(id(job), "?")

        long = scheduler.run(lambda: None)  # both are in the queue before either begins
        long.result(10)
        gate = scheduler.run(lambda: time.sleep(0.1))
        big = scheduler.submit(Request(model.empty_state(), ids_of(model, small_models.TEXT * 3), 1))
        small = scheduler.submit(Request(model.empty_state(), ids_of(model, "entry"), 2))
        names.update({id(big): "big", id(small): "small"})
        gate.result(10)
        scheduler.close(drain=30)
    assert order.index("small") < len(order) - 1 - order[::-1].index("big")
    assert order[-1] == "big" and order.count("big") > 10


def test_short_texts_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen that come together are read in a few turns, not in one each, and so generate together."""
    monkeypatch.setattr(scheduler_module, "SHORT", 2)
    model = small_models.build("delta")
    turns = 16 * 2 // model.grid
    assert 1 <= turns <= 4
    with Scheduler(model) as scheduler:
        gate = scheduler.run(lambda: time.sleep(0.1))  # all are in the queue before one begins
        jobs = [scheduler.submit(Request(model.empty_state(), (5, 6 + n), 9)) for n in range(16)]
        gate.result(10)
        assert [len(job.result(60).ids) for job in jobs] == [9] * 16
        assert scheduler.counts["steps"] <= turns + 9


def test_cancelling_frees_the_slot_at_once_and_keeps_the_state() -> None:
    model = small_models.build("delta")
    with Scheduler(model, slots=1) as scheduler:
        job = scheduler.submit(Request(model.empty_state(), ids_of(model, TEXTS[1]), 100_000))
        waiting = scheduler.submit(Request(model.empty_state(), ids_of(model, TEXTS[2]), 2))
        events = job.wait(60)
        seen = [e for e in itertools.islice(events, 4) if isinstance(e, Token)]
        job.cancel()
        *_, last = events
        assert isinstance(last, Finished) and last.reason == "cancelled"
        assert len(last.ids) >= len(seen) > 0
        assert len(waiting.result(60).ids) == 2
        assert scheduler.load == {"waiting": 0, "reading": 0, "decoding": 0, "state_bytes": 0}


def test_too_many_are_refused_with_a_time_to_come_back() -> None:
    model = small_models.build("delta")
    with Scheduler(model, slots=1, waiting=2) as scheduler:
        jobs = [scheduler.submit(Request(model.empty_state(), (5,), 10_000))]
        with pytest.raises(BusyError) as refused:
            for _ in range(4):
                jobs.append(scheduler.submit(Request(model.empty_state(), (5,), 10_000)))
        assert refused.value.retry_after >= 1
        for job in jobs:
            job.cancel()
            job.result(60)
    with pytest.raises(BusyError):
        scheduler.submit(Request(model.empty_state(), (5,), 1))


def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits() -> None:
    model = small_models.build("delta")
    one = 3 * model.decoder.state_bytes(10)
    with pytest.raises(InputError, match="bytes"), Scheduler(model, memory=one - 1) as scheduler:
        scheduler.submit(Request(model.empty_state(), (5,), 1))
    with Scheduler(model, memory=one) as scheduler:
        jobs = [scheduler.submit(Request(model.empty_state(), (5, 6), 3)) for _ in range(3)]
        assert [len(job.result(60).ids) for job in jobs] == [3, 3, 3]


def test_batches_are_no_larger_than_their_states_memory() -> None:
    model = small_models.build("delta")
    one = COPIES * model.decoder.state_bytes(1)
    for rows, sizes in ((ROWS, [ROWS]), (4 * ROWS, [ROWS, 2 * ROWS, 4 * ROWS]), (1000, [ROWS, 2 * ROWS])):
        with Scheduler(model, slots=2 * ROWS if rows == 1000 else 1000, memory=rows * one) as scheduler:
            assert scheduler.slots.sizes == sizes


def test_tokens_that_nobody_wants_one_by_one_are_told_at_the_end() -> None:
    model = small_models.build("delta")
    told: dict[bool, list[Event]] = {}
    with Scheduler(model) as scheduler:
        for each in (True, False):
            job = scheduler.submit(Request(model.empty_state(), (5, 6), 9, told=each))
            told[each] = [event for event in job.wait(60) if not isinstance(event, Reading)]
    for events in told.values():
        *tokens, end = events
        assert isinstance(end, Finished) and len(end.ids) == 9
        assert "".join(token.text for token in tokens if isinstance(token, Token)) + end.rest == end.text
    assert [len(events) for events in told.values()] == [10, 2]
    assert told[True][-1].text == told[False][-1].text  # type: ignore[union-attr]


class Broken:
    def allow(self, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken on purpose")

    def accept(self, token: int) -> bool:
        return False


def test_an_error_of_one_job_ends_that_job_alone() -> None:
    model = small_models.build("delta")
    with Scheduler(model) as scheduler:
        good = scheduler.submit(Request(model.empty_state(), (5, 6), 12))
        bad = scheduler.submit(Request(model.empty_state(), (5, 6), 12, constraint=Broken()))
        nothing = scheduler.submit(Request(model.empty_state(), (), 12))
        with pytest.raises(RuntimeError, match="on purpose"):
            bad.result(60)
        with pytest.raises(InputError, match="nothing to go on from"):
            nothing.result(60)
        assert len(good.result(60).ids) == 12
    with pytest.raises(StateMismatchError), Scheduler(model) as scheduler:
        scheduler.submit(Request(small_models.build("delta", seed=1).empty_state(), (5,), 1))


def test_a_batch_size_that_rounds_differently_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.build("delta")
    forward = model.decoder.forward

    def rounds(tokens: torch.Tensor, *args: object, **options: object) -> object:
        logits, state = forward(tokens, *args, **options)  # type: ignore[arg-type]
        return (logits * (1 + 1e-7) if tokens.shape[0] == 4 * ROWS else logits), state

    monkeypatch.setattr(model.decoder, "forward", rounds)
    assert slots.Slots(model.decoder, 64).sizes == [ROWS, 2 * ROWS]


def test_reading_tells_how_far_it_is_and_gives_states_on_the_grid() -> None:
    model, states = small_models.build("delta"), list[State]()
    ids = ids_of(model, small_models.TEXT)
    with Scheduler(model) as scheduler:
        events = list(scheduler.submit(Request(model.empty_state(), ids, on_block=states.append)).wait(60))
    last = events[-1]
    assert (
        isinstance(last, Finished)
        and last.reason == "read"
        and not any(isinstance(e, Failed) for e in events)
    )
    done = [e.done for e in events if isinstance(e, Reading)]
    assert done == sorted(set(done)) and len(done) == len(states) == (len(ids) - 1) // model.grid
    assert last.state.id == model.append(ids).id


def test_a_settled_turn_runs_new_tokens_only_and_the_same_from_disk(tmp_path: Path) -> None:
    model = small_models.build("hybrid")
    with Scheduler(model) as scheduler:
        first = scheduler.submit(
            Request(model.empty_state(), ids_of(model, TEXTS[5]), 7, settle=True)
        ).result(60)
        first.state.save(tmp_path / "turn.state")
        before = dict(scheduler.counts)
        more = ids_of(model, " and then?")
        second = scheduler.submit(Request(first.state, more, 6, settle=True)).result(60)
        assert scheduler.counts["tail"] == before["tail"] and second.tail == 0 and not first.state.tail
        again = scheduler.submit(
            Request(model.load_state(tmp_path / "turn.state"), more, 6, settle=True)
        ).result(60)
    assert again.ids == second.ids and again.state.id == second.state.id
    assert second.state.position == first.state.position + len(more) + 6
    live = Live(model.decoder, model.read(TEXTS[5]), ROWS)
    for id in first.ids:
        live.logits()
        live.add(id)
    assert live.settled().id == first.state.id
