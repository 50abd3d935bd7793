"""The page in a real headless Chromium: read, ask, fork, compare, export, import, at desk and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_models
from serve_server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api.expect.set_options(timeout=60_000)
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser, server: Server) -> Iterator[object]:  # type: ignore[no-untyped-def]
    for state in server.http.get("/v1/states").json()["data"]:
        server.http.delete(f"/v1/states/{state['id']}")
    context = browser.new_context(viewport={"width": 1200, "height": 760}, accept_downloads=True)
    made = context.new_page()
    made.set_default_timeout(60_000)
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.goto(server.url)
    yield made
    context.close()
    assert not errors


def test_read_ask_fork_compare_export_import(page, tmp_path: Path, server: Server) -> None:  # type: ignore[no-untyped-def]
    expect = sync_api.expect
    notes = tmp_path / "notes.txt"
    notes.write_text(small_models.TEXT * 4)
    page.set_input_files("#file", notes)
    expect(page.locator("#tree .name")).to_have_text("notes.txt")
    expect(page.locator("#about")).to_contain_text("tokens read")
    expect(page.locator(".bars")).to_contain_text("KV cache it replaces")

    page.fill("#question", "lamp")
    page.keyboard.press("Enter")
    expect(page.locator("#talk li.you")).to_have_text("lamp")
    expect(page.locator("#talk li.answer small")).to_contain_text("kept ones")
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    expect(page.locator("#tree .name")).to_have_text(["notes.txt", "notes.txt · turn 1"])
    assert page.locator("#tree .branch").nth(1).inner_text().strip() == "↳"

    page.locator(".state", has=page.get_by_text("notes.txt", exact=True)).focus()
    page.keyboard.press("f")
    expect(page.locator("#about strong")).to_have_text("notes.txt (fork)")
    page.locator(".state", has=page.get_by_text("notes.txt · turn 1", exact=True)).get_by_text(
        "compare"
    ).click()
    expect(page.locator("#other")).to_be_visible()
    page.fill("#question", "chair")
    page.click("#send")
    expect(page.locator("#talk li.answer small")).to_have_count(1)
    expect(page.locator("#other li.answer small")).to_have_count(1)
    expect(page.locator("#tree .name", has_text="turn 2")).to_have_count(1)

    with page.expect_download() as download:
        page.locator(".state", has=page.get_by_text("notes.txt · turn 1", exact=True)).get_by_text(
            "export"
        ).click()
    download.value.save_as(tmp_path / "back.state")
    page.set_input_files("#import", tmp_path / "back.state")
    expect(page.locator("#about strong")).to_have_text("back")
    assert page.locator("#said").inner_text() == ""
    server.http.get("/health").raise_for_status()

    page.reload()  # the next day
    expect(page.locator("#tree .name", has_text="back")).to_have_count(1)
    page.locator(".state", has=page.get_by_text("back", exact=True)).click()
    page.fill("#question", "door")
    page.keyboard.press("Enter")
    expect(page.locator("#talk li.answer small")).to_contain_text("kept ones")


def test_errors_are_said_and_stopping_stops(page, tmp_path: Path, server: Server) -> None:  # type: ignore[no-untyped-def]
    expect = sync_api.expect
    (tmp_path / "bad.state").write_bytes(b"no state at all")
    page.set_input_files("#import", tmp_path / "bad.state")
    expect(page.locator("#said")).to_contain_text("no state")
    page.on("dialog", lambda dialog: dialog.accept("another name"))
    page.click("#paste")
    page.fill("#text", "entry one\nentry two\n")
    page.get_by_role("button", name="Read").click()
    expect(page.locator("#tree .name")).to_have_text("entry one")
    page.locator(".state").focus()
    page.keyboard.press("r")
    expect(page.locator("#tree .name")).to_have_text("another name")
    page.locator(".state").focus()
    page.keyboard.press("Delete")
    expect(page.locator("#empty")).to_be_visible()


def test_on_a_phone(browser, server: Server, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    expect = sync_api.expect
    context = browser.new_context(viewport={"width": 390, "height": 780}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    expect(page.locator("#library")).to_be_hidden()
    page.tap("#show-library")
    expect(page.locator("#library")).to_be_visible()
    (tmp_path / "phone.txt").write_text(small_models.TEXT)
    page.set_input_files("#file", tmp_path / "phone.txt")
    expect(page.locator("#library")).to_be_hidden()  # the state is open, the chat is there
    page.fill("#question", "lamp")
    page.tap("#send")
    expect(page.locator("#talk li.answer small")).to_contain_text("kept ones")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
