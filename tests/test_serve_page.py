"""The page in a real browser, Debian's Chromium, whose microphone hears one of the clips of the package.

    apt-get install --no-install-recommends chromium
    pip install playwright
    QWEN2AUDIO_SCREENSHOTS=docs/images pytest -m slow tests/test_serve_page.py

The variable is for those who want new pictures in the documentation.
"""

import base64
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs the extra `serve`")
pytest.importorskip("playwright", reason="the page is tested with playwright")

from playwright import sync_api as playwright
from served import served

from qwen2audio_jax import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor
from qwen2audio_jax.embedded import example
from qwen2audio_jax.engine import Engine
from qwen2audio_jax.serve.app import Readiness, Settings, make_app
from qwen2audio_jax.serve.page import HEADERS

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow(seconds=8, together="page"),
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Debian's chromium"),
]
expect = playwright.expect
KEY = "the key"
SPOKEN = 2500
"""Milliseconds in which the clip is over."""
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN2AUDIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, processor = Qwen2AudioForConditionalGeneration.from_pretrained(), Qwen2AudioProcessor.from_pretrained()
        with Engine(model, processor, slots=2, positions=1024) as engine:
            yield engine, processor


@contextmanager
def address_of(engine, **settings):
    readiness = Readiness()
    readiness.ready = True
    with served(make_app(*engine, Settings("qwen2audio-embedded", **settings), readiness)) as url:
        yield url


@pytest.fixture(scope="module")
def address(engine):
    with address_of(engine) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={example('sum-two-plus-three')}%noloop",
            ],
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, *, refusals=(), **options):
    """A page in which nothing may go wrong, and which may ask nobody else."""
    context = browser.new_context(viewport={"width": 1000, "height": 760}, permissions=["microphone"], **options)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    response = page.goto(address)
    assert response.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    yield page
    assert [text for text in said if not any(str(status) in text for status in refusals)] == []
    assert {url for url in asked if not url.startswith((f"{address}/", "blob:"))} == set()
    context.close()


def picture(page, name):
    if folder := os.environ.get("QWEN2AUDIO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def answers(page):
    return page.locator(".answered .words")


def drop(page, name):
    data = base64.b64encode(example(name).read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type: "audio/wav" }));
            return transfer;
        }""",
        [data, f"{name}.wav"],
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_hidden()


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def ended(page, count):
    expect(page.locator(".answered:not([aria-busy]) .figures")).to_have_count(count)


def test_a_file_and_two_questions_on_it(browser, address):
    with opened(browser, address) as page:
        drop(page, "digits-4719")
        clip = page.locator("#clips .player")
        expect(clip.locator(".name")).to_have_text("digits-4719.wav")
        expect(clip.locator(".seconds")).to_have_text(re.compile(r"0:0[2-3]\.\d"))
        painted = clip.locator("canvas").evaluate(
            "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)"
        )
        assert painted
        ask(page, "Which digits are spoken?")
        expect(answers(page)).to_have_text("The digits are 4 7 1 9.")
        ended(page, 1)
        ask(page, "How many digits are spoken?")
        expect(answers(page).nth(1)).to_have_text("Four digits are spoken.")
        player = page.locator(".asked .player")
        player.get_by_role("button", name="Play digits-4719.wav").click()
        expect(player.get_by_role("button", name="Pause digits-4719.wav")).to_be_visible()
        expect(player.get_by_role("button", name="Play digits-4719.wav")).to_be_visible(timeout=10_000)
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator("#log li")).to_have_count(0)
        expect(page.locator("#welcome")).to_be_visible()


def test_the_keyboard_alone(browser, address):
    with opened(browser, address) as page:
        page.keyboard.down("Space")
        expect(page.locator("#talk")).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(SPOKEN)
        page.keyboard.up("Space")
        expect(answers(page)).to_have_text("2 plus 3 is 5.")
        ended(page, 1)
        # A recording that is dropped, from the button and by taps.
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.locator("#talk").evaluate("(button) => button === document.activeElement"):
                break
        page.keyboard.press("Enter")
        expect(page.locator("#talk-words")).to_contain_text("tap to end")
        page.keyboard.press("Escape")
        expect(page.locator("#talk")).to_have_attribute("aria-pressed", "false")
        # Settings, and an answer of the length that they say.
        for _ in range(3):
            page.keyboard.press("Tab")
            if page.locator("summary").evaluate("(element) => element === document.activeElement"):
                break
        page.keyboard.press("Enter")
        for label in ("Temperature", "Most tokens of an answer"):
            page.keyboard.press("Tab")
            expect(page.get_by_label(label)).to_be_focused()
        page.keyboard.press("Control+a")
        page.keyboard.type("3")
        page.get_by_label("Message").focus()
        page.keyboard.type("Which digits are spoken?")
        page.keyboard.press("Enter")
        expect(page.locator(".figures").nth(1)).to_contain_text("cut at the length")


def test_a_phone_in_the_dark(browser, address):
    options = {"color_scheme": "dark", "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with opened(browser, address, **options) as page:
        page.set_viewport_size(PHONE)
        drop(page, "high-voice-306")
        ask(page, "Is the voice high or low?")
        expect(answers(page)).to_have_text("The voice is high.")
        ended(page, 1)
        page.locator("summary").tap()
        expect(page.get_by_label("System prompt")).to_be_visible()
        page.locator("summary").tap()
        widths = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == PHONE["width"]
        for name in ("talk", "send", "attach"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["height"] >= 44
            assert box["x"] + box["width"] <= PHONE["width"]
        picture(page, "page-phone")


def test_a_key_an_error_and_an_answer_that_is_stopped(browser, engine):
    with address_of(engine, keys=(KEY,)) as address, opened(browser, address, refusals=(401, 400)) as page:
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_have_value("")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_have_text("qwen2audio-embedded")
        page.locator("summary").click()
        page.get_by_label("Most tokens of an answer").fill("5000")
        ask(page, "Hello")
        expect(page.get_by_role("alert")).to_contain_text("1024")
        page.get_by_label("Most tokens of an answer").fill("900")
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("alert")).to_have_count(0)
        ended(page, 1)
        page.get_by_label("Temperature").fill("2")
        ask(page, "Count.")
        page.keyboard.press("Escape")
        ended(page, 2)
        expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_speaking_then_asking_in_writing(browser, address):
    with opened(browser, address) as page:
        expect(page.locator("#state")).to_have_text("qwen2audio-embedded")
        picture(page, "page-empty")
        button = page.locator("#talk")
        button.hover()
        page.mouse.down()
        expect(button).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(SPOKEN)
        page.mouse.up()
        expect(answers(page)).to_have_text("2 plus 3 is 5.")
        expect(page.locator(".figures")).to_have_text(re.compile(r"\d\.\d\d s to the first token · \d+ tokens/s"))
        expect(page.locator(".asked .player .seconds")).to_have_text(re.compile(r"0:0[12]\.\d"))
        ask(page, "Is this speech, a tone or noise?")
        expect(answers(page).nth(1)).to_have_text("This is speech.")
        drop(page, "tone")
        ask(page, "Which of the two clips is a tone?")
        expect(answers(page).nth(2)).to_have_text("The second clip.")
        ended(page, 3)
        picture(page, "page")
