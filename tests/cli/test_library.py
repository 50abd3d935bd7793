"""The commands of the library: store, find, ask --library; and simulate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linstate.state.store import StateStore

pytest.importorskip("lancedb")


@pytest.fixture
def library(cli):
    Path("a.txt").write_text("the red lamp is broken\n" * 8)
    Path("b.txt").write_text("the roof leaks above the stairs\n" * 8)
    return [json.loads(line) for line in cli("store", "add", "a.txt", "b.txt", "--json").out.splitlines()]


def test_add_list_show(cli, library, own_folder):
    assert [one["name"] for one in library] == ["a.txt", "b.txt"]
    assert library[0]["new_tokens"] == library[0]["position"] and library[0]["ids_kept"]
    assert (own_folder / "home" / ".linstate" / "store" / "catalogue.sqlite").is_file()
    again = json.loads(cli("store", "add", "a.txt", "--name", "again", "--tag", "kind=note", "--json").out)
    assert again["new_tokens"] == 0 and again["tags"] == {"source": "a.txt", "kind": "note"}
    listed = cli("store", "ls", "--json").json
    assert [one["name"] for one in listed["states"]] == ["again", "b.txt", "a.txt"]
    assert listed["usage"]["states"] == 3
    assert [s["name"] for s in cli("store", "ls", "--tag", "kind=note", "--json").json["states"]] == ["again"]
    assert "b.txt" in cli("store", "ls").out
    shown = cli("store", "show", "again", "--json").json
    assert shown["ancestors"] == ["a.txt"] and shown["state"]["position"] == again["position"]
    assert "kind=note" in cli("store", "show", again["id"][:10]).out


def test_fork_export_import_remove(cli, library, own_folder):
    fork = json.loads(cli("store", "fork", "a.txt", "--name", "what if", "--json").out)
    assert fork["parent"] == library[0]["id"]
    Path("key").write_text("0123456789abcdef\n")
    assert cli("store", "export", "what if", "-o", "x.state", "--key", "key").code == 0
    assert "exists" in cli("store", "export", "what if", "-o", "x.state").error
    back = json.loads(cli("store", "import", "x.state", "--key", "key", "--name", "back", "--json").out)
    assert back["digest"] == fork["digest"]
    Path("other").write_text("fedcba9876543210")
    assert "not signed with this key" in cli("store", "import", "x.state", "--key", "other").error
    assert "not signed" in cli("store", "import", "x.state", "--key", "key", "--tenant", "x").error
    before = cli("store", "verify", "--json").json["objects"]
    assert cli("store", "rm", "a.txt", "what if", "back", "b.txt").code == 0
    assert before > 0 and not [path for path in Path().rglob("objects/??/*") if path.is_file()]  # at once
    assert cli("store", "gc", "--json").json["objects"] == 0
    assert cli("store", "ls", "--json").json["states"] == []
    assert "no state 'a.txt'" in cli("store", "show", "a.txt").error


def test_verify_says_what_is_wrong(cli, library, own_folder):
    assert cli("store", "verify").code == 0
    folder = own_folder / "home" / ".linstate" / "store"
    next(folder.rglob(library[0]["digest"])).write_bytes(b"x")
    found = cli("store", "verify", "--json")
    assert found.code == 1 and len(found.json["problems"]) == 1 and library[0]["id"] in found.out


def test_find_and_ask(cli, library):
    found = cli("find", "stairs", "--json").json["found"]
    assert found[0]["state"]["name"] == "b.txt" and "roof" in found[0]["passage"]["text"]
    assert cli("find", "lamp", "--by", "words").out.startswith("a.txt\t0-")
    assert cli("find", "--rebuild", "--json").json == {"found": [], "indexed": 2}
    assert "nothing in the library" in cli("find", "xyzzy", "--by", "words").err
    answer = cli("ask", "--library", "red lamp", "--max-tokens", "4", "--json").json["answers"][0]
    assert answer["composition"] == "alone" and answer["sources"][0]["name"] == "a.txt"
    both = cli("ask", "--library", "red lamp lamp roof", "--states", "2", "--max-tokens", "4").out
    assert "a.txt, b.txt (picaso, approximate)" in both


def test_another_place(cli, own_folder, monkeypatch):
    Path("a.txt").write_text("the red lamp is broken\n")
    monkeypatch.setenv("LINSTATE_STORE", str(own_folder / "elsewhere"))
    assert cli("store", "add", "a.txt").code == 0
    assert StateStore(own_folder / "elsewhere").get("a.txt").position > 0
    assert "needs a file on a local disk" in cli("store", "ls", "--store", "s3://bucket/x").error


def test_what_is_refused(cli):
    Path("empty.txt").write_text("")
    assert "text is empty" in cli("store", "add", "empty.txt").error
    assert "cannot read nowhere.txt" in cli("store", "add", "nowhere.txt").error
    Path("short").write_text("k")
    Path("x.state").write_text("")
    assert "at least 16" in cli("store", "import", "x.state", "--key", "short").error
    assert cli("find").code == 2


def test_simulate(cli):
    found = cli("simulate", "prefill", "--gbps", "1,10", "--sites", "1", "--json").json
    assert found["paper"]["offloading"] == 3.24 and len(found["points"]) == 8
    assert "32 H200 read what is long" in cli("simulate", "prefill", "--profiles", "recurrent").out
    assert "expected numbers above 0" in cli("simulate", "prefill", "--gbps", "fast").error
    assert "expected one of hybrid" in cli("simulate", "prefill", "--profiles", "x").error
