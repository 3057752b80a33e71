"""The page in a real browser, over the small default: what is typed is seen, a fork and a reload go on.

The fixture `browser` (tests/conftest.py) says where it is and what happens without one.
LONGSANA_SCREENSHOTS names a folder for the pictures of docs/live.md.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longsana.commands.generate import DEFAULT_CONFIG
from longsana.commands.serve import served_by
from longsana.config import InferenceConfig, load_config
from longsana.serving.studio import Studio
from longsana.serving.values import Limits, Order
from longsana.shapes.scenes import parse_caption
from longsana.shapes.sight import observe
from longsana.shapes.verifier import judge
from tests.serving.fake import FakeSession, FakeStudio, served
from tests.serving.server import Running

ROOT = Path(__file__).parents[2]
RED = "A big red circle moves slowly to the right on a black background."
BLUE = "A big blue square stays still on a gray background."
YELLOW = "A big yellow circle stays still on a teal background."
SHOT = """async (n) => {
  const video = document.querySelectorAll("video")[n], canvas = document.createElement("canvas");
  if (!video || !video.videoWidth) return null;
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(video, 0, 0);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let text = "";
  for (let i = 0; i < pixels.length; i += 4096) text += String.fromCharCode(...pixels.subarray(i, i + 4096));
  return [canvas.height, canvas.width, btoa(text)];
}"""


def until(page: Any, expression: str, seconds: float = 60.0) -> None:
    """Wait for an expression of the page's; its policy forbids what Playwright's own way would do."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, (expression, page.inner_text("body"))
        page.wait_for_timeout(50)


def shows(page: Any, caption: str, player: int = 0) -> bool:
    """Whether the verifier sees in a player's picture what a caption says, motion aside."""
    shot = page.evaluate(SHOT, player)
    if shot is None:
        return False
    height, width, text = shot
    picture = np.frombuffer(base64.b64decode(text), np.uint8).reshape(1, 1, height, width, 4)[..., :3]
    promise = parse_caption(caption)
    assert promise is not None, caption
    verdicts = judge(observe(torch.from_numpy(picture.copy())), [promise])
    return all(float(verdict.min()) == 1 for verdict in (verdicts.colour, verdicts.kind, verdicts.background))


def sees(page: Any, caption: str, player: int = 0, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not shows(page, caption, player):
        assert time.monotonic() < end, (caption, page.inner_text("body"))
        page.wait_for_timeout(200)


def playing(player: int) -> str:
    """An expression: the player shows pictures."""
    return (
        "((v) => v && v.videoWidth && v.buffered.length && v.currentTime > v.buffered.start(0))"
        f"(document.querySelectorAll('video')[{player}])"
    )


def screenshots(page: Any) -> None:
    """Take the pictures of the documents: two players side by side, and a phone in the dark."""
    folder = os.environ.get("LONGSANA_SCREENSHOTS")
    if folder is None:
        return
    phone = page.viewport_size
    page.evaluate("document.activeElement.blur()")
    for name, size, scheme in [("desktop", {"width": 960, "height": 900}, "light"), ("phone", phone, "dark")]:
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=Path(folder) / f"{name}.png")
    page.emulate_media(color_scheme="light")


def seen(text: str, player: int = 0) -> str:
    """An expression: the player says that the prompt is seen."""
    return (
        f"[...(document.querySelectorAll('#players section')[{player}]?.querySelectorAll('ol li') || [])]"
        f".some((li) => li.dataset.state === 'seen' && li.textContent.startsWith({text!r}))"
    )


@pytest.mark.timeout(240)
def test_one_types_a_prompt_forks_and_loads_the_page_again(
    browser: Any, running: Callable[..., Running], tmp_path: Path
) -> None:
    config: InferenceConfig = load_config(ROOT / DEFAULT_CONFIG)
    limits = Limits(sessions=4, load=100.0)  # however busy the machine is
    server = running(Studio(config, limits=limits, snapshots=tmp_path / "s"), served_by(config, "longsana", limits, 2))
    page = browser.new_context(viewport={"width": 360, "height": 780}).new_page()  # a phone's
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(server.url)
    until(page, "document.getElementById('model').textContent.startsWith('longsana')")
    page.focus("#prompt")  # from here on with the keyboard alone
    page.keyboard.press("Control+a")
    page.keyboard.type(RED)
    page.keyboard.press("Enter")
    until(page, playing(0))
    sees(page, RED)
    page.focus("#players textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type(BLUE)
    page.keyboard.press("Enter")
    until(page, seen(BLUE))
    sees(page, BLUE)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    page.focus("[data-do=fork]")
    page.keyboard.press("Enter")
    until(page, playing(1))
    page.focus("#players section:nth-child(2) textarea")
    page.keyboard.press("Control+a")
    page.keyboard.type(YELLOW)
    page.keyboard.press("Enter")
    until(page, seen(YELLOW, 1))
    sees(page, YELLOW, 1)
    sees(page, BLUE)  # which goes on as it was
    page.focus("[data-do=snapshot]")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#players ul li')")
    screenshots(page)
    ids = {session.id for session in server.studio.figures().sessions}
    page.reload()
    until(page, playing(0))
    until(page, playing(1))
    sees(page, BLUE)
    sees(page, YELLOW, 1)
    assert {session.id for session in server.studio.figures().sessions} == ids and len(ids) == 2
    assert page.evaluate("document.querySelectorAll('#players ul li').length") == 1
    page.focus("[data-do=pause]")
    page.keyboard.press("Space")
    until(page, "document.querySelector('[data-do=pause]').getAttribute('aria-pressed') === 'true'")
    page.keyboard.press("Space")
    until(page, "document.querySelector('[data-do=pause]').getAttribute('aria-pressed') === 'false'")
    page.evaluate("players[0].socket.close()")  # a connection that is lost
    until(page, "players[0].tries > 0")
    until(page, "players[0].tries === 0 && players[0].chunks.length")
    until(page, playing(0))
    sees(page, BLUE)
    assert {session.id for session in server.studio.figures().sessions} == ids
    page.goto("about:blank")
    for session in list(ids):  # as after a restart: the sessions are gone, their snapshots are not
        server.studio.session(session).close()
    page.goto(server.url)
    until(page, playing(0))
    until(page, playing(1))
    sees(page, BLUE)
    assert ids.isdisjoint(session.id for session in server.studio.figures().sessions)
    for player in (1, 0):
        page.locator("[data-do=stop]").nth(player).click()
        until(page, f"document.querySelectorAll('[data-do=stop]')[{player}].textContent === 'Close'")
        page.locator("[data-do=stop]").nth(player).click()
    assert server.studio.figures().sessions == () and page.locator("video").count() == 0
    picture = tmp_path / "a.png"  # what a video begins with
    Image.new("RGB", (640, 384), (14, 74, 76)).save(picture)
    page.set_input_files("#picture", picture)
    page.fill("#prompt", YELLOW)
    page.keyboard.press("Enter")
    until(page, playing(0))
    assert page.locator(".state.bad").count() == 0
    assert [error for error in errors if "favicon" not in error] == []


ENTRIES = "[...document.querySelectorAll('#players section ol li')]"
STATES = f"{ENTRIES}.map((li) => li.dataset.state)"
WAITS = "waits for the video"
HEBREW = "עיגול אדום זז ימינה"


def test_what_is_typed_is_checked_shortened_and_kept(browser: Any, running: Callable[..., Running]) -> None:
    server = running(key="s3cret")  # whose chunks show a prompt's colour
    page = browser.new_context(viewport={"width": 360, "height": 780}).new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    until(page, "!document.getElementById('locked').hidden")
    for none in ("ключ", "s3 cret", "schlüssel"):  # which no header can carry, and no server has
        page.fill("#key", none)
        page.keyboard.press("Enter")
        assert page.locator("#said.bad").inner_text().startswith("This is no key: one has Latin letters")
        assert page.evaluate("document.activeElement.id === 'key' && memory.key() === null"), none
        page.evaluate("say('')")
    page.fill("#key", " s3cret ")  # as it may be pasted
    page.keyboard.press("Enter")
    until(page, "document.getElementById('model').textContent.startsWith('fake')")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    page.fill("#prompt", "  ")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('said').textContent.startsWith('A prompt is missing')")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.fill("#prompt", HEBREW)
    page.fill("#seed", "9007199254740993")  # which JavaScript would round
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('seed').validity.rangeOverflow && !players.some(Boolean)")
    assert not server.studio.sessions
    page.fill("#seed", str(2**53 - 1))
    page.keyboard.press("Enter")
    until(page, playing(0))
    (session,) = server.studio.sessions.values()
    assert session.order.seed == 2**53 - 1
    directions = "((li) => [li.querySelector('bdi'), li].map((one) => getComputedStyle(one).direction))"
    assert page.evaluate(f"{directions}({ENTRIES}[0])") == ["rtl", "ltr"]
    box = page.locator("#players textarea")
    box.fill(" ")
    box.press("Enter")
    assert "A prompt is missing" in page.locator(".state").inner_text() and page.evaluate(f"{ENTRIES}.length") == 1
    long = "a green square that is told in many words " * 450
    box.fill(long)
    box.press("Enter")
    until(page, f"{ENTRIES}.at(-1).dataset.state === 'seen'")
    assert len(page.locator("ol li").last.inner_text()) < 300
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    number = page.evaluate("players[0].chunks.at(-1).number")
    until(page, f"players[0].chunks.at(-1).number > {number} + 1")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"  # nor is it folded again
    assert long.strip() in page.locator("ol li").last.inner_text()
    page.keyboard.press("Enter")
    for name in ("red", "blue", "gray") * 3:
        box.fill(f"a {name} square")
        box.press("Enter")
    assert page.evaluate("((ol) => ol.scrollHeight - ol.clientHeight - ol.scrollTop < 2)(document.querySelector('ol'))")
    page.click("[data-do=snapshot]")
    until(page, "document.querySelector('#players ul li')")
    page.click("[data-do=stop]")
    until(page, "players[0].ended")
    page.click("#players ul button")
    until(page, playing(1))
    assert page.locator("#players section").count() == 2 and page.locator("#players ul li").count() == 1
    page.evaluate("sessionStorage.setItem('longsana.key', 'another'); players[1].socket.close()")
    until(page, "players[1].element.dataset.state === 'the API key is missing or wrong'")
    until(page, "!document.getElementById('locked').hidden")
    assert errors == []


def test_a_snapshot_is_offered_where_there_are_any(browser: Any, running: Callable[..., Running]) -> None:
    page = browser.new_context().new_page()
    page.goto(running(what=replace(served(), snapshots=False)).url)
    until(page, "document.getElementById('model').textContent.startsWith('fake')")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    until(page, playing(0))
    assert page.locator("[data-do=snapshot]").count() == 0
    assert page.get_by_text("This server keeps no snapshots").is_visible()


def listed(page: Any) -> list[str]:
    """Return the words of the prompts in the first player's list."""
    texts: list[str] = page.evaluate("players[0].known.prompts.map((p) => p.text)")
    assert page.evaluate(f"{ENTRIES}.map((li) => li.querySelector('bdi').textContent)") == texts
    return texts


READY = "document.getElementById('model').textContent.startsWith('fake')"


def begun(page: Any, url: str, prompt: str = RED, **fields: str) -> None:
    """Have the page begin a video, with what else is in its form."""
    page.goto(url)
    until(page, READY)
    for name, value in (fields | {"prompt": prompt}).items():
        page.fill(f"#{name}", value)
    page.focus("#prompt")
    page.keyboard.press("Enter")


def test_who_waits_in_the_queue_and_what_he_typed_survive_a_reload(
    browser: Any, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    change = FakeSession.change

    def listening(session: FakeSession, prompt: str, *more: Any) -> str:
        heard.append(prompt)
        return change(session, prompt, *more)

    monkeypatch.setattr(FakeSession, "change", listening)
    server = running(FakeStudio(Limits(sessions=1)))
    before = server.studio.start(Order(prompt="gray", num_frames=None))
    page = browser.new_context().new_page()
    waiting = "players[0]?.element.dataset.state === 'waiting: place 1 of 1 in the queue'"
    begun(page, server.url, size="96x64", seed="7")
    until(page, waiting)
    names = [f"square {n} is {name}" for n, name in enumerate(("green", "blue") * 8)]
    box = page.locator("#players textarea")
    for name in [*names, "one too many"]:
        box.fill(name)
        box.press("Enter")
    assert page.locator(".state").inner_text() == "Not sent: 16 prompts wait."
    assert box.input_value() == "one too many"
    page.reload()
    until(page, waiting)
    assert page.locator("[data-do=stop]").inner_text() == "Close"  # there is nothing to stop
    assert listed(page) == [RED, *names] and set(page.evaluate(STATES)) == {WAITS} and not heard
    before.close()
    until(page, playing(0))
    until(page, f"{STATES}.every((state) => state === 'seen')")
    assert heard == names
    (session,) = server.studio.sessions.values()
    assert (session.order.prompt, session.order.seed, session.width, session.height) == (RED, 7, 96, 64)
    for n in range(45):
        box.fill(f"a red square, {n}")
        box.press("Enter")
    until(page, f"{STATES}.at(-1) !== 'asked'")
    texts = listed(page)
    assert len(texts) == 40 and texts[0] == RED and texts[-1] == "a red square, 44"
    page.click("[data-do=stop]")
    until(page, "players[0].ended")
    box.fill("too late")
    box.press("Enter")
    assert page.locator(".state.bad").inner_text() == "Not sent: this video has ended; start another."
    assert listed(page) == texts and box.input_value() == "too late"
    assert not {WAITS, "asked", "queued"} & set(page.evaluate(STATES))
    page.reload()
    until(page, READY)
    assert page.locator("video").count() == 0


def test_what_is_typed_at_once_is_sent_after_the_start(browser: Any, running: Callable[..., Running]) -> None:
    page = browser.new_context().new_page()
    page.goto(running().url)
    until(page, READY)
    page.evaluate(
        """async ([first, ...texts]) => {
          $("prompt").value = first; $("prompt").form.requestSubmit();
          const box = players[0].q("textarea");
          for (const text of texts) { box.value = text; box.form.requestSubmit(); }
        }""",
        [RED, "a green square", "a blue square"],
    )
    until(page, f"{STATES}.every((state) => state === 'seen')")
    assert listed(page) == [RED, "a green square", "a blue square"]


@pytest.mark.parametrize("snapshots", [True, False])
def test_what_is_typed_between_two_sessions_is_sent_or_refused(
    browser: Any, running: Callable[..., Running], snapshots: bool
) -> None:
    server = running(what=replace(served(), snapshots=snapshots))
    page = browser.new_context().new_page()
    begun(page, server.url)
    until(page, "players[0].order.state" if snapshots else playing(0))
    until(page, playing(0))
    page.evaluate("RETRY.fill(1500); players[0].socket.close()")
    box = page.locator("#players textarea")
    box.fill("a green square")  # while the connection closes
    box.press("Enter")
    until(page, "!players[0].socket")
    box.fill("a blue square")
    box.press("Enter")
    assert page.evaluate(STATES) == ["seen", WAITS, WAITS]
    (session,) = server.studio.sessions.values()
    session.close()
    if snapshots:
        until(page, f"{STATES}.every((state) => state === 'seen')")
    else:
        until(page, "players[0].ended")
        assert page.locator(".state.bad").inner_text().startswith("session_id: there is no such session any more")
        assert page.evaluate(STATES) == ["seen", "not made", "not made"]
    assert listed(page) == [RED, "a green square", "a blue square"]


@pytest.mark.parametrize("snapshots", [True, False])
def test_a_fork_that_waits_in_the_queue_survives_a_reload(
    browser: Any, running: Callable[..., Running], snapshots: bool
) -> None:
    limits = Limits(sessions=1)
    server = running(FakeStudio(limits), replace(served(limits), snapshots=snapshots))
    page = browser.new_context().new_page()
    begun(page, server.url, "a green square")
    until(page, playing(0))
    if snapshots:
        until(page, "players[0].order.state")
    waiting = "players[1]?.element.dataset.state.startsWith('waiting: place 1 of')"
    page.click("[data-do=fork]")
    until(page, waiting)
    page.reload()
    until(page, waiting)
    until(page, playing(0))
    page.locator("[data-do=stop]").first.click()
    until(page, playing(1))
    (session,) = server.studio.sessions.values()
    assert session.point.prompt == "a green square" and (session.order.snapshot is not None) == snapshots


def test_an_order_that_is_refused_is_told_and_forgotten(browser: Any, running: Callable[..., Running]) -> None:
    server = running()
    page = browser.new_context().new_page()
    begun(page, server.url, size="40x40")
    until(page, "players[0]?.ended")
    assert "must be a multiple of 16" in page.locator(".state.bad").inner_text()
    assert page.evaluate(STATES) == ["not made"]
    page.reload()
    until(page, READY)
    assert page.locator("video").count() == 0
    page.add_init_script("MediaSource.isTypeSupported = () => false")
    begun(page, server.url)
    until(page, "players[0]?.ended")
    assert page.locator(".state.bad").inner_text().startswith("this browser cannot play video/mp4")
    assert page.evaluate(STATES) == ["not made"]


def test_a_full_storage_is_told(browser: Any, running: Callable[..., Running]) -> None:
    page = browser.new_context().new_page()
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }")
    begun(page, running().url)
    until(page, playing(0))
    assert page.locator("#said.bad").inner_text() == "this tab's storage is full: a reload loses the video"


NAMED = ("button", "textbox", "spinbutton", "combobox", "checkbox")
"""Roles of what one can do, each of which a screen reader must be able to call something."""


def test_a_screen_reader_has_names_for_all_and_hears_what_happens(
    browser: Any, running: Callable[..., Running]
) -> None:
    """By Chromium's own tree of what it tells such readers, before and while a video plays."""
    page = browser.new_context().new_page()
    page.goto(running().url)
    until(page, "document.getElementById('model').textContent.startsWith('fake')")
    reader = page.context.new_cdp_session(page)

    def told() -> list[tuple[str, str]]:
        nodes = reader.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "").strip())
            for node in nodes
            if not node.get("ignored")
        ]

    page.fill("#prompt", "a red square")
    for playing_yet in (False, True):
        if playing_yet:
            page.keyboard.press("Enter")
            until(page, playing(0))
        found = told()
        assert sum(role in NAMED for role, _ in found) > 4 + 3 * playing_yet
        assert [role for role, name in found if role in NAMED and not name] == []
        assert any(role in ("status", "log") for role, _ in found)  # where states are told as they change
        assert any(role == "heading" and name for role, name in found)
