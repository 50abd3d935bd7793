"""``ask``, ``generate``, ``chat``: answers from a state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.conftest import prose
from linstate import LanguageModel, State
from linstate.engine.asking import question_prompt


@pytest.fixture
def model(models):
    return LanguageModel.from_pretrained(models / "tiny")


@pytest.fixture
def state(model):
    made = model.read(prose(1500))
    made.save("s.state")
    return made


def test_ask_answers_from_the_state_and_leaves_it_alone(cli, model, state):
    before = Path("s.state").read_bytes()
    one = cli("ask", "s.state", "colour of the lamp", "--max-tokens", 6)
    assert (one.code, one.out) == (0, model.ask("colour of the lamp", state, max_tokens=6) + "\n")
    Path("q.txt").write_text("second\n\nthird\n")
    many = cli("ask", "s.state", "first", "--file", "q.txt", "--max-tokens", 6, "--json")
    assert [a["question"] for a in many.json["answers"]] == ["first", "second", "third"]
    assert [a["answer"] for a in many.json["answers"]] == [
        model.ask(q, state, max_tokens=6) for q in ("first", "second", "third")
    ]
    piped = cli("ask", "s.state", "--file", "-", "--max-tokens", 6, stdin="first\nsecond\n")
    assert [line.split("\t")[0] for line in piped.out.splitlines()] == ["first", "second"]
    assert Path("s.state").read_bytes() == before
    assert cli("ask", "s.state").code == 2


def test_generate_streams_what_the_library_generates(cli, model, state):
    made = model.generate("lamp", state, max_tokens=30)
    assert cli("generate", "lamp", "--state", "s.state", "--max-tokens", 30).out == made.text
    assert cli("generate", "-", "--state", "s.state", "--max-tokens", 30, stdin="lamp").out == made.text
    as_json = cli("generate", "lamp", "--state", "s.state", "--max-tokens", 30, "--json").json
    assert (as_json["text"], as_json["ids"], as_json["id"]) == (made.text, list(made.ids), made.state.id)


def test_generate_goes_on_from_what_it_saved(cli):
    whole = cli("generate", "key: ", "--max-tokens", 40, "--json").json["ids"]
    first = cli("generate", "key: ", "--max-tokens", 15, "-o", "g.state", "--json").json["ids"]
    then = cli("generate", "--state", "g.state", "--max-tokens", 25, "-o", "g.state", "--json").json["ids"]
    assert first + then == whole
    assert "g.state exists" in cli("generate", "key: ", "-o", "g.state").error


def test_generate_samples_and_stops(cli):
    options = ("--temperature", 1, "--top-k", 50, "--top-p", 0.95, "--max-tokens", 60)
    one, again = (cli("generate", "x", *options, "--seed", 3).out for _ in range(2))
    assert one == again != cli("generate", "x", *options, "--seed", 4).out
    mark = one[len(one) // 2 :][:3]
    assert cli("generate", "x", *options, "--seed", 3, "--stop", mark).out == one[: one.index(mark)]
    assert cli("generate").code == 2
    assert "nothing to go on from" in cli("generate", "").error
    assert "top_p" in cli("generate", "x", "--top-p", 0).error


def test_chat_keeps_the_conversation(cli, model, state):
    Path("more.txt").write_text(prose(700, seed=5))
    lines = [
        "who?",
        "/read more.txt",
        "/fork before",
        "and what?",
        "/undo",
        "/info",
        "/nonsense",
        "/read nowhere",
        "",
        "/quit",
        "x",
    ]
    done = cli("chat", "s.state", "-o", "talk.state", "--max-tokens", 8, stdin="\n".join(lines))
    assert done.code == 0
    first = model.generate(question_prompt("who?"), state, max_tokens=8, stop=("\n",))
    assert (
        done.out.splitlines()[0] == first.text.strip()
        or done.out.splitlines()[0].strip() == first.text.strip()
    )
    kept = State.load("talk.state")
    assert kept.id == State.load("before.state").id
    assert kept.id == model.read("\n\n" + prose(700, seed=5), first.state).id
    assert "there is no /nonsense" in done.out and "error: cannot read nowhere" in done.err
    assert State.load("s.state").id == state.id
    assert json.loads(kept.notes["sources"])["count"] == 1


def test_chat_saves_back_to_its_state_and_nothing_without_one(cli, state):
    done = cli("chat", "s.state", "--max-tokens", 4, stdin="one\n/save copy.state\ntwo\n")
    assert done.code == 0
    assert State.load("copy.state").position > state.position
    assert State.load("s.state").id == state.id, "/save moved the conversation to the copy"
    assert cli("chat", "s.state", "--max-tokens", 4, stdin="one\n").code == 0
    assert State.load("s.state").position > state.position
    before = set(Path().iterdir())
    assert cli("chat", "--max-tokens", 4, stdin="one\n/save\n").code == 0
    assert set(Path().iterdir()) == before


def test_info_fork_compose(cli, model, state):
    Path("a.txt").write_text(prose(600))
    cli("read", "a.txt", "-o", "a.state", "--title", "[a] letter")
    plain = cli("info", "a.state").out
    assert "[a] letter" in plain and "not signed" in plain and "2 x gated_deltanet" in plain
    found = cli("info", "a.state", "--json").json
    assert found["kv_cache_bytes"] == 2 * 2 * 32 * found["position"] * 4 and found["read"]["sources"] == 1
    assert cli("info", "a.state", "--json", model="other").json["kv_cache_bytes"] == found["kv_cache_bytes"]
    state.save("signed.state", key=b"k")
    assert cli("info", "signed.state", "--json").json["signed"] is True

    assert cli("fork", "a.state", "-o", "b.state", "--title", "second", "--json").json["lineage"] == [
        found["id"]
    ]
    assert State.load("b.state").id == found["id"] and State.load("b.state").notes["title"] == "second"
    assert "b.state exists" in cli("fork", "a.state", "-o", "b.state").error

    joined = cli("compose", "a.state", "s.state", "-o", "c.state", "--json").json
    assert joined["composition"] == "approximate" and joined["position"] == found["position"] + state.position
    expected = model.settle(State.load("a.state")).compose(state)
    assert State.load("c.state").id == expected.id
    assert "composed" in cli("info", "c.state").out


def test_info_of_a_model(cli, models):
    found = cli("info", models / "tiny", "--json", model=None).json
    assert (found["name"], found["d_model"], found["layers"]) == ("tiny", 32, ["gated_deltanet"] * 2)
    assert "2 x gated_deltanet, width 32" in cli("info").out
