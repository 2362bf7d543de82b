"""The page of a list in a browser: headless Chromium, where there is one."""

from __future__ import annotations

import shutil

import pytest
from predictions import make_prediction

from engine.cards.markup import write_page
from engine.errors import InputError

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra `test`)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium, such as Debian's package `chromium`"
)

HOSTILE = "</script></style><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    results = [
        ("b.jpg", make_prediction("The mayor opens a bridge", size=(640, 480))),
        ("a10.jpg", make_prediction("A calm harbour", (), manipulated=False, score=0.02, size=(300, 900))),
        ("absent.jpg", InputError("item 2 ('absent.jpg'): no such file")),
        ("a9.jpg", make_prediction("Harbour " + "x" * 300, (), score=0.99, detected=("text_swap",))),
        ("hostile.jpg", make_prediction(HOSTILE, (), score=0.6, detected=())),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text("".join(write_page(results)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a fresh context; what the browser complains of is an error."""
    contexts, complaints = [], []

    def open_page(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page):
    """The names of the pairs that can be seen, from the top."""
    return [x.inner_text() for x in page.locator("article h2 bdi").all() if x.is_visible()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_nothing_is_cut_and_the_head_is_on_top(open_page, width, color_scheme):
    page = open_page(width, color_scheme=color_scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    edges = page.evaluate(
        "[...document.querySelectorAll('article, article *, header *')]"
        ".map(x => x.getBoundingClientRect()).filter(r => r.width).map(r => [r.left, r.right]).flat()"
    )
    assert min(edges) >= 0 and max(edges) <= width
    heights = page.evaluate(
        "['header', 'main'].map(x => document.querySelector(x).getBoundingClientRect().top)"
    )
    assert heights[0] < heights[1]


def test_the_evidence_lies_on_its_image(open_page):
    page = open_page(400)
    rectangle = lambda what: page.locator("article").first.locator(what).bounding_box()  # noqa: E731
    image, heat, box = rectangle(".photo img:not(.layer)"), rectangle("img.layer"), rectangle(".box")
    assert heat == image
    assert box["x"] == pytest.approx(image["x"] + image["width"] / 4, abs=1)
    assert box["width"] == pytest.approx(image["width"] / 2, abs=1)
    page.locator("#marks").uncheck()
    assert not page.locator("article .layer").first.is_visible()
    assert page.locator("article img").first.is_visible()


def test_pairs_are_sorted_and_filtered(open_page):
    page = open_page()
    assert shown(page) == ["b.jpg", "a10.jpg", "absent.jpg", "a9.jpg", "hostile.jpg"]
    for order, names in {
        "highest": ["a9.jpg", "b.jpg", "hostile.jpg", "a10.jpg", "absent.jpg"],
        "lowest": ["a10.jpg", "hostile.jpg", "b.jpg", "a9.jpg", "absent.jpg"],
        "name": ["a9.jpg", "a10.jpg", "absent.jpg", "b.jpg", "hostile.jpg"],
        "order": ["b.jpg", "a10.jpg", "absent.jpg", "a9.jpg", "hostile.jpg"],
    }.items():
        page.select_option("#sort", order)
        assert shown(page) == names
    page.fill("#text", "HARBOUR")
    assert shown(page) == ["a10.jpg", "a9.jpg"]
    assert page.locator("#shown").inner_text() == "2 of 5 shown"
    page.select_option("#verdict", "not-manipulated")
    assert shown(page) == ["a10.jpg"]
    page.fill("#text", "")
    page.select_option("#verdict", "error")
    assert shown(page) == ["absent.jpg"]
    page.select_option("#verdict", "")
    page.select_option("#type", "text_swap")
    assert shown(page) == ["a9.jpg"]


def test_without_scripts_it_is_a_plain_list(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("article").count() == 5
    assert page.locator("article").nth(1).is_visible() and not page.locator("form").is_visible()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_hostile_caption_runs_nothing(open_page, width):
    page = open_page(width)
    assert page.evaluate("window.broken") is None
    assert HOSTILE in page.locator("article .caption").last.inner_text()


def test_a_link_leads_to_its_pair(open_page):
    page = open_page(400)
    page.click("#pair-4 h2 a")
    assert page.url.endswith("#pair-4")
    assert page.locator("#pair-4").bounding_box()["y"] < 900
