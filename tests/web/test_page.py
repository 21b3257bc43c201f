"""The status page in a real browser: it loads, moves, streams, stops, and asks nobody but its server."""

import asyncio
import base64
import shutil
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
from playwright.sync_api import expect, sync_playwright

from tenfold.serve.app import create_app
from tenfold.serve.settings import ServeConfig
from tests.web.fake import PagedLLM

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
FLAGS += " disable-sync"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")


class Site:
    """A server around models made of a few lines, on a port of this machine, in a thread."""

    def __init__(self, **settings) -> None:
        self.llm = PagedLLM()
        self.app = create_app({"tiny": self.llm, "other": PagedLLM()}, ServeConfig(**settings))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self) -> "Site":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.listener.close()

    def chat(self, **headers: str) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi there, you"}]}
        assert httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_playwright() as runner:
        chromium = runner.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS.split()])
        yield chromium
        chromium.close()


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as started:
        yield started


@pytest.fixture
def open_page(browser, site) -> Iterator:
    """`open_page(**context)`: the page, which must end without a word in the console and without foreign requests."""
    told, contexts = [], []

    def go(**context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(15000)
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(site.url) else told.append(sent.url))
        page.goto(site.url)
        expect(page.locator("#state")).to_have_text("ready")
        return page

    yield go
    for context in contexts:
        context.close()
    assert told == []


def tile(page, title):
    return page.locator(".tile", has_text=title)


def test_it_shows_what_the_server_says(site, open_page):
    site.llm.running = 3
    page = open_page()
    expect(page).to_have_title("tiny · ready · Tenfold")
    expect(tile(page, "Running").locator(".value")).to_have_text("3")
    expect(page.locator(".chart h2")).to_have_text(["Throughput", "Prompts", "Requests in the engine"])
    expect(page.locator(".is-memory")).to_contain_text("58240 tokens in 3640 pages of 16")
    expect(page.locator(".is-timeline")).to_contain_text("510 ms")
    expect(page.locator(".is-facts")).to_contain_text("compiled for AVX-512 VNNI")
    expect(page.locator(".bar").first).to_have_attribute("aria-label", "used 120, cached 700, free 2,820")


def test_what_runs_can_be_searched(open_page):
    page = open_page()
    expect(page.locator("#choices tbody tr")).to_have_count(13)  # one for the four batches of which nothing differs
    expect(page.locator("#choices tr", has_text="3072 x 576")).to_contain_text("1–8")
    page.fill("#search", "attend split")
    expect(page.locator("#choices tbody tr")).to_have_count(4)
    expect(page.locator("#choices-count")).to_have_text("4 of 16")
    page.fill("#search", "")
    expect(page.locator("#choices tbody tr")).to_have_count(13)


def test_charts_and_figures_move(site, open_page):
    page = open_page()
    expect(tile(page, "Time to first token").locator(".value")).to_have_text("–")
    before = page.locator(".chart .line-0").first.get_attribute("d")
    site.chat()
    expect(tile(page, "Throughput").locator(".note")).to_have_text("peak 15 in 5 min")
    expect(tile(page, "Time to first token").locator(".value")).not_to_have_text("–")
    expect(page.locator(".is-counts dl > div").first).to_have_text("answered1")
    assert page.locator(".chart .line-0").first.get_attribute("d") != before


def test_a_chart_can_be_read_with_the_keyboard(site, open_page):
    site.chat()
    page = open_page()
    expect(tile(page, "Throughput").locator(".note")).to_have_text("peak 15 in 5 min")
    page.locator(".chart svg").first.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".chart .cursor")).to_have_count(1)
    expect(page.locator(".chart .legend").first).to_contain_text("1 s ago")


def test_another_model_can_be_shown(site, open_page):
    site.llm.running = 3
    page = open_page()
    expect(tile(page, "Running").locator(".value")).to_have_text("3")
    page.select_option("#shown", "other")
    expect(tile(page, "Running").locator(".value")).to_have_text("0")
    expect(page).to_have_title("other · ready · Tenfold")


def test_states_are_shown(site, open_page):
    page = open_page()
    site.llm.state, site.llm.restarts = "restarting", 2
    expect(page.locator("#state")).to_have_text("restarting")
    expect(page.locator(".is-counts dl > div").last).to_have_text("engine restarts2")
    site.app.state.service.draining = True
    expect(page.locator("#state")).to_have_text("draining")


def test_the_playground_streams_and_stops(site, open_page):
    page = open_page()
    site.llm.hold = asyncio.Event()
    page.fill("#message", "What is this?")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.user")).to_have_text("What is this?")
    expect(page.locator(".assistant .body")).to_have_text("The page shows")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".assistant .meta")).to_contain_text("stopped")
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".is-counts")).to_contain_text("cancelled1")
    assert len(site.llm.cancelled) == 1

    site.llm.hold = None
    page.fill("#message", "And this?")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".assistant .body").last).to_contain_text("and why .")
    expect(page.locator(".assistant .meta").last).to_contain_text("15 tokens")
    expect(page.locator(".assistant .meta").last).to_contain_text("first token")
    expect(page.locator(".assistant .meta").last).to_contain_text("tok/s")
    assert [message["role"] for message in site.llm.rendered[-1][0]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_options_of_the_playground_are_sent(site, open_page):
    page = open_page()
    page.get_by_text("Options").click()
    page.get_by_label("System prompt").fill("Be kind.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("4")
    page.fill("#message", "Hi")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .meta")).to_contain_text("4 tokens")
    assert site.llm.rendered[-1][0][0] == {"role": "system", "content": "Be kind."}
    params = site.llm.calls[-1]["params"]
    assert (params.temperature, params.max_tokens) == (0.5, 4)


def sse(*chunks):
    return "".join(f"data: {chunk}\n\n" for chunk in chunks)


def test_text_of_a_model_is_never_markup_and_reasoning_is_folded(open_page):
    page = open_page()
    stream = sse(
        '{"choices": [{"delta": {"role": "assistant", "reasoning_content": "Hm, <b>so</b>."}}]}',
        '{"choices": [{"delta": {"content": "<img src=x onerror=alert(1)><script>alert(2)</script>"}}]}',
        "[DONE]",
    )
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=stream))
    page.fill("#message", "<i>Hi</i>")
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .body")).to_have_text("<img src=x onerror=alert(1)><script>alert(2)</script>")
    expect(page.locator(".turn.user")).to_have_text("<i>Hi</i>")
    assert page.locator("#log :is(img, script, i, b)").count() == 0
    expect(page.locator(".thought pre")).not_to_be_visible()
    page.get_by_text("Reasoning").click()
    expect(page.locator(".thought pre")).to_have_text("Hm, <b>so</b>.")


def test_errors_are_sentences(site, browser):
    """Before the stream, and in the middle of it. The browser notes a failed request in the console, which is right."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("ready")
    page.fill("#message", "x" * 3000)
    page.keyboard.press("Enter")
    expect(page.locator(".problem")).to_contain_text("tokens; this server takes prompts of up to 2047 tokens")
    body = sse('{"choices": [{"delta": {"content": "So"}}]}', '{"error": {"message": "The engine stopped."}}')
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=200, content_type="text/event-stream", body=body))
    page.fill("#message", "Hi")
    page.keyboard.press("Enter")
    expect(page.locator(".problem").last).to_have_text("The engine stopped.")
    expect(page.locator(".assistant .body").last).to_have_text("So")
    context.close()


def test_a_wrong_key_is_told_in_a_sentence(browser):
    with Site(api_key="right") as site:
        context = browser.new_context(http_credentials={"username": "any", "password": "right"})
        page = context.new_page()
        page.goto(site.url)
        expect(page.locator("#state")).to_have_text("ready")  # the browser sends what it was told for the page
        page.click("#key-open")
        page.fill("#key", "wrong")
        page.get_by_role("button", name="Use", exact=True).click()
        expect(page.locator("#notice")).to_contain_text("The API key is missing or wrong")
        expect(page.locator("#state")).to_have_text("no access")
        page.click("#key-open")
        page.fill("#key", "right")
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#state")).to_have_text("ready")
        assert page.evaluate("[localStorage.length, sessionStorage.getItem('tenfold-key')]") == [0, "right"]
        page.fill("#message", "Hi")
        page.keyboard.press("Enter")
        expect(page.locator(".assistant .body")).to_contain_text("and why")
        context.close()


def test_a_server_that_is_gone(browser):
    with Site() as site:
        context = browser.new_context()
        page = context.new_page()
        page.goto(site.url)
        expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#state")).to_have_text("offline")
    expect(page.locator("#notice")).to_contain_text("keeps trying")
    context.close()


GROUND = "getComputedStyle(document.body).backgroundColor"


def test_light_and_dark(open_page):
    light, dark = open_page(color_scheme="light"), open_page(color_scheme="dark")
    colours = {"light": light.evaluate(GROUND), "dark": dark.evaluate(GROUND)}
    assert colours["light"] != colours["dark"]
    light.get_by_role("button", name="Use dark colours").click()
    assert light.evaluate(GROUND) == colours["dark"]
    light.reload()
    assert light.evaluate(GROUND) == colours["dark"]
    light.get_by_role("button", name="Use light colours").click()
    assert light.evaluate(GROUND) == colours["light"]


def test_nothing_sticks_out(open_page):
    page = open_page()
    page.fill("#message", "w" * 300)
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .body")).to_contain_text("and why")
    page.click("#key-open")
    page.get_by_text("Options").click()
    for width in (320, 375, 641, 768, 1079, 1080, 1440, 2560):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_can_be_used_with_the_keyboard(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#playground")).to_be_focused()
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:5] == ["clear", "SUMMARY", "log", "message", "send"]
    unnamed = page.evaluate(
        """[...document.querySelectorAll("input, select, textarea, button")].filter((e) =>
           !e.labels?.length && !e.textContent.trim() && !e.getAttribute("aria-label")).length"""
    )
    assert unnamed == 0


def test_less_motion(open_page):
    page = open_page(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.part')).transitionDuration") == "0s"


PICTURE = """data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFElEQVR4nGP8z8DAwMDAxMDAwAAACAwA
AfCgaNoAAAAASUVORK5CYII=""".replace("\n", "")


def test_pictures_are_shown_sent_and_answered(open_page, site):
    """To models that see only; the picture stands above its question, and goes to the server as it is."""
    page = open_page()
    expect(page.locator("#add")).to_be_hidden()
    site.llm.sees = True
    page.reload()
    expect(page.locator("#add")).to_be_visible()
    content = {"name": "dot.png", "mimeType": "image/png", "buffer": base64.b64decode(PICTURE.partition(",")[2])}
    page.locator("#files").set_input_files([content, content])
    expect(page.locator("#pictures img")).to_have_count(2)
    page.locator("#pictures button").first.click()
    expect(page.locator("#pictures img")).to_have_count(1)
    page.locator("#message").fill("What is it?")
    page.locator("#send").click()
    expect(page.locator(".turn.user img")).to_have_count(1)
    expect(page.locator(".turn.user")).to_have_text("What is it?")
    expect(page.locator(".turn.assistant .body")).to_contain_text("The page shows")
    expect(page.locator("#pictures img")).to_have_count(0)
    (messages, _) = site.llm.rendered[-1]
    image, text = messages[-1]["content"]
    assert image["type"] == "image"
    assert image["image"] == content["buffer"]
    assert text == {"type": "text", "text": "What is it?"}
    page.locator("#chat-model").evaluate("node => { node.value = 'other'; node.dispatchEvent(new Event('change')); }")
    expect(page.locator("#add")).to_be_hidden()
