"""The page to try the service, in headless Chromium, where there is one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra `test`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, such as Debian's package `chromium`"
)

HOSTILE = "Obama speaks </script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
TOKEN = "a-token-of-some-length"
DROP = """([selector, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], "dropped.jpg", {type: "image/jpeg"}));
  const target = document.querySelector(selector);
  const event = selector === "body"
    ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
    : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
  target.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, run_server):
    """Opens the page in a fresh context; what it asks of other servers and complains of is an error."""
    contexts, complaints = [], []

    def open_page(width=1280, path="/", expected=(), **settings):
        running = run_server(**settings)
        context = browser.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()

        def complain(text):
            if not any(part in text for part in expected):
                complaints.append(text)

        page.on("console", lambda message: complain(message.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith((running.url, "blob:", "data:")) or complain(request.url),
        )
        page.goto(running.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def predict(page):
    page.click("#send")
    page.wait_for_selector("#answer:not([hidden])", timeout=20_000)


@pytest.fixture
def file(tmp_path, jpeg):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg)
    return path


@pytest.mark.parametrize("width", [1280, 400])
def test_a_pair_is_answered(open_page, file, predictor, width):
    page = open_page(width)
    page.set_input_files("#image", file)
    page.fill("#caption", HOSTILE)
    predict(page)
    assert HOSTILE in page.locator("#card .caption").inner_text()
    assert page.evaluate("window.broken") is None
    expected = predictor.predict(file, HOSTILE)
    page.click("summary")
    shown = json.loads(page.locator("#json").inner_text())
    assert shown["score"] == expected.score and len(shown["heatmap"]) == 16 and "card" not in shown
    with page.expect_download() as download:
        page.click("#download")
    assert json.loads(Path(download.value.path()).read_text()) == shown
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.activeElement.tagName") != "BODY"
    page.locator("#marks").uncheck()
    assert page.locator("#card .layer:visible").count() == 0


@pytest.mark.parametrize("selector", ["#zone", "body"])
def test_an_image_is_dropped_or_pasted_and_removed(open_page, jpeg, selector):
    page = open_page(400)
    page.evaluate(DROP, [selector, list(jpeg)])
    page.wait_for_function("document.getElementById('preview').naturalWidth === 64")
    assert page.locator("#name").inner_text() == "dropped.jpg"
    predict(page)
    assert "no_caption" in page.locator("#card").inner_text()
    page.click("#remove")
    assert not page.locator("#chosen").is_visible()
    page.click("#send")
    assert "Choose an image" in page.locator("#problem").inner_text()


def test_the_keyboard_alone_and_a_refusal(open_page, tmp_path):
    page = open_page(expected=["422"])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    page.set_input_files("#image", broken)
    page.focus("#caption")
    page.keyboard.type("Obama")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "(invalid_input)" in page.locator("#problem").inner_text()
    assert not page.locator("#answer").is_visible()


def test_a_token_is_asked_for(open_page):
    page = open_page(token=TOKEN, expected=["401"])
    page.fill("#caption", "Obama")
    page.click("#send")
    page.wait_for_selector("#problem:not([hidden])")
    assert "(unauthorized)" in page.locator("#problem").inner_text()
    page.fill("#token", TOKEN)
    predict(page)
    assert page.locator("#card .verdict").inner_text() == "Not answered"


def test_a_box_is_asked_for_checked_and_shown(open_page, file, judging):
    """The network that judges a given box finds that very box here, so the two lie on each other."""
    page = open_page(asked=judging, expected=["422"])
    page.set_input_files("#image", file)
    page.fill("#caption", "Obama speaks")
    for box, message in (("", "got none; give box="), ("8,6,40", "got '8,6,40'"), ("8,6,99,30", "clip it")):
        page.fill("#box", box)
        page.click("#send")
        page.wait_for_function(
            "text => document.getElementById('problem').textContent.includes(text)", arg=message
        )
        assert not page.locator("#answer").is_visible()
    page.fill("#box", "8, 6, 40, 30")
    predict(page)
    assert not page.locator("#problem").is_visible()
    assert "box given 8, 6, 40, 30" in page.locator("#card .legend").inner_text()
    image, given = (
        page.locator(f"#card {what}").last.bounding_box()
        for what in (".photo img:not(.layer)", ".layer.given")
    )
    assert given["x"] - image["x"] == pytest.approx(image["width"] * 8 / 64, abs=1)
    assert given["width"] == pytest.approx(image["width"] * 32 / 64, abs=1)
    assert given["height"] == pytest.approx(image["height"] * 24 / 48, abs=1)
    page.click("summary")
    shown = json.loads(page.locator("#json").inner_text())
    assert shown["box_given"] == [8, 6, 40, 30]
    page.locator("#marks").uncheck()
    assert page.locator("#card .layer:visible").count() == 0


@pytest.mark.parametrize("asked", ["predictor", "judging"])
def test_every_field_has_a_name(open_page, request, asked):
    page = open_page(token=TOKEN, asked=request.getfixturevalue(asked))
    assert page.locator("#box").count() == (asked == "judging")
    for field in page.locator("input, textarea, button").all():
        if field.is_visible():
            label = field.evaluate("x => x.labels?.[0]?.innerText || x.innerText")
            assert label.strip()
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("h1").count() == 1


@pytest.mark.parametrize("width", [1280, 400])
def test_the_reference_fits(open_page, width):
    page = open_page(width, "/docs")
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert "/v1/predict" in page.locator("main").inner_text()
    links = page.locator("main a").evaluate_all("x => x.map(a => a.getAttribute('href'))")
    assert len(links) > 10
    missing = page.evaluate("x => x.filter(h => !document.getElementById(h.slice(1)))", links)
    assert missing == []
