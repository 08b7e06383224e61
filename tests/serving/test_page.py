"""The server's page in a real browser, against a server that answers as a test chooses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_server import PAGE, FakeServer, serving
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Locator,
    Page,
    Playwright,
    Request,
    expect,
    sync_playwright,
)

NO_BROWSER = (
    "no Chromium: install Debian's package chromium, "
    "or run `.venv/bin/python -m playwright install --with-deps chromium`"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
MOST_BYTES = 24_000
expect.set_options(timeout=20_000)


def find_chromium(playwright: Playwright) -> str | None:
    """The system's browser, or else the one that playwright itself installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = find_chromium(playwright)
        if chromium is None:
            pytest.skip(NO_BROWSER)
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake


@pytest.fixture
def page(browser: Browser, server: FakeServer) -> Iterator[Page]:
    """The page, opened. No test may leave an error in its console or ask another host."""
    errors: list[str] = []
    addresses: list[str] = []

    def on_console(message: ConsoleMessage) -> None:
        # The browser itself reports every answer of status 4xx or 5xx so.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            errors.append(message.text)

    def on_request(request: Request) -> None:
        addresses.append(request.url)

    with browser.new_context(
        viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    ) as context:
        page = context.new_page()
        page.on("console", on_console)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", on_request)
        page.goto(server.url)
        yield page
    assert errors == []
    hosts = {urlsplit(address).netloc for address in addresses if not address.startswith("data:")}
    assert hosts == {urlsplit(server.url).netloc}


def send(page: Page, text: str) -> None:
    expect(page.get_by_role("status")).to_have_text("Ready")
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def turn(page: Page) -> Locator:
    """The last question and its answer."""
    return page.locator(".turn").last


def test_page_is_one_small_file_that_names_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert "innerHTML" not in text
    # What is not on the page itself is only an XML namespace inside the icon.
    assert re.findall(r"https?://[^\s'\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(?:script|img|link)[^>]*\ssrc=", text)


def test_model_and_limits_show(page: Page, server: FakeServer) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text("unispec smollm2")
    expect(page).to_have_title("smollm2 · unispec")
    facts = page.locator("#facts")
    for text in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-135m-eagle3",
        "1 a step",
        "2,048 tokens",
        "at most 8",
        "0.1.0",
    ):
        expect(facts.get_by_text(text, exact=True)).to_be_visible()
    expect(facts.get_by_text("eagle3", exact=True)).to_be_visible()


def test_target_without_draft(page: Page, server: FakeServer) -> None:
    server.status.update(draft=None, speculative_method=None, num_speculative_tokens=None)
    page.reload()
    expect(page.locator("#facts")).to_contain_text("none: one token a step")
    expect(page.locator("#facts")).not_to_contain_text("Method")
    server.usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    send(page, "hello")
    expect(turn(page)).to_contain_text("1 token")
    expect(turn(page)).not_to_contain_text("drafted")


def test_starting_becomes_ready_without_reload(page: Page, server: FakeServer) -> None:
    server.status.update(state="starting", phase="loading weights and compiling the graph")
    page.reload()
    expect(page.get_by_role("status")).to_have_text("Starting")
    expect(page.get_by_text("Loading weights and compiling the graph")).to_be_visible()
    page.get_by_label("Message").fill("hello")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    page.get_by_label("Message").press("Enter")
    page.evaluate("window.kept = true")
    server.status.update(state="ready")
    expect(page.get_by_role("status")).to_have_text("Ready")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert page.evaluate("window.kept")
    assert server.bodies == []


def test_answer_streams_and_its_numbers_show(page: Page, server: FakeServer) -> None:
    server.pieces = ["Two\n\n", "    lines ", "é🙂"]
    server.go_on.clear()
    send(page, "hello")
    expect(turn(page).locator(".answer")).to_have_text("Two\n\n    lines é🙂", use_inner_text=True)
    expect(page.locator(".numbers")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    server.go_on.set()
    numbers = turn(page).locator(".numbers")
    expect(numbers).to_contain_text("128 tokens")
    expect(numbers).to_contain_text(re.compile(r"[\d.]+ tokens/s"))
    expect(numbers).to_contain_text(re.compile(r"first token after \d+ ms"))
    expect(numbers).to_contain_text("30 of 120 drafted tokens accepted (25%)")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_settings_and_earlier_turns_are_sent(page: Page, server: FakeServer) -> None:
    send(page, "first")
    expect(page.locator(".numbers")).to_have_count(1)
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed").fill("3")
    page.get_by_text("System text").first.click()
    page.get_by_role("textbox", name="System text").fill("Be short.")
    page.get_by_label("Message").fill("second")
    page.get_by_label("Message").press("Shift+Enter")
    page.get_by_label("Message").press_sequentially("line")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".numbers")).to_have_count(2)
    first, second = server.bodies
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    asked = {"role": "user", "content": "first"}
    assert first == {"model": "smollm2", "messages": [asked], "max_tokens": 256, **stream}
    assert second == {
        "model": "smollm2",
        "messages": [
            {"role": "system", "content": "Be short."},
            asked,
            {"role": "assistant", "content": "An answer."},
            {"role": "user", "content": "second\nline"},
        ],
        "temperature": 0.5,
        "max_tokens": 7,
        "seed": 3,
        **stream,
    }
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    send(page, "third")
    expect(page.locator(".numbers")).to_have_count(1)
    assert [message["content"] for message in server.bodies[-1]["messages"]] == [
        "Be short.",
        "third",
    ]


def test_wrong_setting_is_not_sent(page: Page, server: FakeServer) -> None:
    page.get_by_label("Temperature").fill("-1")
    page.get_by_text("Settings").click()
    send(page, "hello")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.get_by_label("Message")).to_have_value("hello")
    assert server.bodies == []


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_aborts_the_request(page: Page, server: FakeServer, by: str) -> None:
    server.go_on.clear()
    send(page, "hello")
    expect(turn(page).locator(".answer")).to_have_text("An answer.")
    if by == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(turn(page).locator(".numbers")).to_contain_text("stopped")
    assert server.disconnected.wait(10)
    expect(turn(page).locator(".answer")).to_have_text("An answer.")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_cut_off_answer_says_so(page: Page, server: FakeServer) -> None:
    server.finish_reason = "length"
    send(page, "hello")
    expect(turn(page)).to_contain_text("cut off at max tokens")


def test_refusal_shows_the_servers_sentence(page: Page, server: FakeServer) -> None:
    server.refusal = (400, "the prompt has 3000 tokens; this server takes at most 2048")
    send(page, "hello")
    expect(turn(page).get_by_role("alert")).to_have_text(server.refusal[1])
    expect(page.get_by_label("Message")).to_have_value("hello")
    server.refusal = None
    page.get_by_role("button", name="Send").click()
    expect(turn(page).locator(".answer")).to_have_text("An answer.")
    assert len(server.bodies[-1]["messages"]) == 1, "a refused message is no part of the chat"


def test_error_within_an_answer_keeps_what_came(page: Page, server: FakeServer) -> None:
    server.error_within = "the server is stopping"
    send(page, "hello")
    expect(turn(page).get_by_role("alert")).to_have_text("the server is stopping")
    expect(turn(page).locator(".answer")).to_have_text("An answer.")


def test_server_that_goes_away_is_noticed(page: Page, server: FakeServer) -> None:
    expect(page.get_by_role("status")).to_have_text("Ready")
    page.route("**/*", lambda route: route.abort())
    expect(page.get_by_role("status")).to_have_text("No answer from the server")
    page.unroute("**/*")
    expect(page.get_by_role("status")).to_have_text("Ready")


def test_html_in_an_answer_is_text(page: Page, server: FakeServer) -> None:
    html = "<img src=x onerror='window.ran = 1'><script>window.ran = 1</script><b>bold</b>"
    server.pieces = list(html)
    server.status.update(model="<i>m</i>", target="<script>window.ran = 1</script>")
    page.reload()
    send(page, html)
    expect(turn(page).locator(".numbers")).to_be_visible()
    expect(turn(page).locator(".answer")).to_have_text(html)
    expect(turn(page).locator(".asked")).to_have_text(html)
    expect(page.locator("#model")).to_have_text("<i>m</i>")
    assert page.locator(".turn img, .turn b, .turn script, #facts script").count() == 0
    assert page.evaluate("window.ran") is None


def test_401_asks_for_the_key(page: Page, server: FakeServer) -> None:
    server.key = "secret"
    send(page, "hello")
    key = page.get_by_label("API key")
    expect(page.get_by_role("alert")).to_have_text("This server needs an API key.")
    expect(key).to_be_focused()
    expect(page.get_by_label("Message")).to_have_value("hello")
    key.fill("wrong")
    key.press("Enter")
    expect(key).to_have_value("")
    expect(key).to_be_focused()
    key.fill("secret")
    key.press("Enter")
    expect(turn(page).locator(".answer")).to_have_text("An answer.")
    expect(key).to_be_hidden()
    assert len(server.bodies) == 1
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $API_KEY"')


def test_curl_line_can_be_copied(page: Page, server: FakeServer) -> None:
    server.status.update(model="it's")
    page.reload()
    expect(page.locator("#curl")).to_contain_text(f"curl {server.url}/v1/chat/completions")
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#curl").text_content()
    assert '"model": "it\'\\\'\'s"' in copied


@pytest.mark.parametrize("width", [320, 390, 768, 1920])
def test_nothing_is_wider_than_the_screen(browser: Browser, server: FakeServer, width: int) -> None:
    server.status.update(model="organisation/" + "long" * 20, target="/models/" + "long" * 40)
    server.pieces = ["word" * 100]
    with browser.new_context(viewport={"width": width, "height": 700}) as context:
        page = context.new_page()
        page.goto(server.url)
        send(page, "question" * 40)
        expect(page.locator(".numbers")).to_be_visible()
        page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb, as WCAG defines it."""
    digits = colour.lstrip("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    values = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        ("ink", "ground"),
        ("ink", "sheet"),
        ("ink", "tint"),
        ("soft", "ground"),
        ("soft", "sheet"),
        ("accent", "sheet"),
        ("on-accent", "accent"),
        ("warn", "sheet"),
        ("bad", "sheet"),
        ("bad", "bad-tint"),
    ],
)
def test_text_stands_out_from_its_ground(text: str, ground: str, scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[scheme]))
    low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
    assert (high + 0.05) / (low + 0.05) >= 4.5
