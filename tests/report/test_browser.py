"""The page in a browser: no error, no request; searched, sorted, hovered, in two themes.

The browser is the system's Chromium; without one these tests are skipped.
"""

from __future__ import annotations

import os
import shutil

import pytest

import lorafold as lf

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly", reason="plotly is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
SIZES = [24, 500]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this system")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        # As root there is no sandbox to be had.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(collection, tmp_path_factory):
    """{size: Report}, written once."""
    folder = tmp_path_factory.mktemp("pages")
    return {n: lf.report(collection(n), folder / f"{n}.html") for n in SIZES}


@pytest.fixture
def opened(browser, reports):
    """opened(size, scheme) -> page; at the end, nothing must have gone wrong on any."""
    contexts, wrong, asked = [], [], []

    def open_page(size, scheme="light"):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        contexts.append(context)
        context.set_default_timeout(600_000)  # a busy machine is no failure
        page = context.new_page()
        page.on(
            "console",
            lambda m: wrong.append(m.text) if m.type in ("error", "warning", "trace") else 0,
        )
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(reports[size].path.resolve().as_uri())
        page.wait_for_function(
            """() => [...document.querySelectorAll("figure > div")].every(
                d => d.querySelector(".main-svg"))"""
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


def shown(page, column, of_cell):
    """What an expression gives of a column's cells in the rows that are to be seen."""
    return page.eval_on_selector_all(
        "#adapters tbody tr",
        f"""rows => rows.filter(r => r.offsetParent !== null).map(r => r.cells[{column}])
                        .map(cell => {of_cell})""",
    )


def names_shown(page):
    return shown(page, 0, "cell.textContent")


def numbers_shown(page, column):
    return shown(page, column, "Number(cell.dataset.value)")


@pytest.mark.parametrize("size", SIZES)
def test_every_picture_is_drawn(opened, reports, size):
    page = opened(size)
    drawn = page.eval_on_selector_all("figure > div", "all => all.map(d => d.id)")
    assert {"picture-similarity", "picture-spectra", "picture-energy", "picture-norms"} <= set(
        drawn
    )
    for figure in page.query_selector_all("figure > div"):
        assert len(figure.get_attribute("aria-label")) > 40
        box = figure.bounding_box()
        assert box["width"] > 600
        assert box["height"] > 100
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, "the page scrolls sideways"


@pytest.mark.parametrize("size", SIZES)
def test_the_table_filters_and_sorts(opened, size):
    page = opened(size)
    assert len(names_shown(page)) == size
    page.fill("#find", "adapter-00")
    found = shown(page, 0, "cell.parentElement.textContent")
    assert all("adapter-00" in text for text in found)
    assert [n for n in names_shown(page) if "-00" in n] == [f"adapter-{i:03}" for i in range(10)]
    assert page.text_content("#count") == f"{len(found)} of {size} rows"
    page.fill("#find", "ADAPTER-000 ")  # whatever the case
    assert "adapter-000" in names_shown(page)
    assert len(names_shown(page)) < len(found)
    page.fill("#find", "no such adapter")
    assert names_shown(page) == []
    page.fill("#find", "")
    assert len(names_shown(page)) == size

    head = page.locator("#adapters thead th")
    column = head.all_text_contents().index("norm")
    norms = numbers_shown(page, column)
    head.nth(column).get_by_role("button").click()
    assert head.nth(column).get_attribute("aria-sort") == "descending"
    assert numbers_shown(page, column) == sorted(norms, reverse=True)
    head.nth(column).get_by_role("button").click()
    assert numbers_shown(page, column) == sorted(norms)
    head.nth(0).get_by_role("button").click()
    assert head.nth(column).get_attribute("aria-sort") is None
    ordered = [n for n in names_shown(page) if n.startswith("adapter-")]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("size", SIZES)
def test_hover_names_the_pair(opened, size, nasty):
    page = opened(size)
    page.locator("#picture-similarity").scroll_into_view_if_needed()
    # The middle of the cell of the two that are alike, one of them with a name that is markup.
    place = page.evaluate(
        """() => {
            const div = document.getElementById("picture-similarity");
            const { xaxis, yaxis } = div._fullLayout;
            const names = div.data[0].x;
            const [i, j] = [names.findIndex(n => n.includes("alert(1)&lt;/script")),
                            names.findIndex(n => n.includes("bold"))];
            const box = div.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.c2p(i),
                    box.top + yaxis._offset + yaxis.c2p(j)];
        }"""
    )
    page.mouse.move(*place)
    page.wait_for_selector("#picture-similarity .hoverlayer .hovertext")
    text = page.text_content("#picture-similarity .hoverlayer .hovertext")
    assert nasty[0] in text
    assert nasty[1] in text
    assert "cosine 1.000" in text


def test_counts_and_spectra_have_ticks_that_tell(opened):
    page = opened(24)
    ticks = "all => all.map(t => t.textContent)"
    counts = page.eval_on_selector_all("#picture-starts .xtick text", ticks)
    assert counts == [str(k) for k in range(len(counts))]
    assert len(counts) > 2
    assert len(page.eval_on_selector_all("#picture-spectra .ytick text", ticks)) > 2


def test_no_button_leads_out(opened):
    page = opened(24)
    led_out = []
    page.context.on("page", lambda new: led_out.append(new.url))
    page.on("framenavigated", lambda frame: led_out.append(frame.url))
    buttons = page.locator("#picture-energy .modebar-btn")
    titles = [buttons.nth(i).get_attribute("data-title") for i in range(buttons.count())]
    assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]
    page.locator("#picture-energy").hover()
    with page.expect_download() as download:  # made in the page, of what it shows
        buttons.nth(0).click()
    assert download.value.suggested_filename.endswith(".png")
    assert download.value.url.startswith(("data:", "blob:"))
    for i in range(1, len(titles)):
        buttons.nth(i).click()
    assert not led_out


def test_names_are_data(opened, nasty):
    page = opened(24)
    shown = names_shown(page)
    for name in nasty:
        assert name.replace("\n", "\\n") in shown
    # On the map's sides too, where plotly would take <b> for bold.
    ticks = page.eval_on_selector_all(
        "#picture-similarity .ytick text, #picture-similarity .yaxislayer-above text",
        "all => all.map(t => t.textContent)",
    )
    assert "<b>bold</b>" in ticks
    assert page.query_selector("main img, main script, td b, td script") is None


@pytest.mark.parametrize("size", SIZES)
def test_both_themes(opened, size):
    def colors(page):
        return page.evaluate(
            """() => {
                const text = document.querySelector("#picture-energy .xtitle");
                return [getComputedStyle(document.body).backgroundColor,
                        getComputedStyle(document.body).color, getComputedStyle(text).fill];
            }"""
        )

    def light(rgb):
        return sum(map(int, rgb[rgb.index("(") + 1 : -1].split(",")[:3])) > 382

    found = {}
    for scheme in ("light", "dark"):
        page = opened(size, scheme)
        found[scheme] = ground, text, title = colors(page)
        assert light(ground) == (scheme == "light")
        assert light(text) == light(title) != light(ground)
    page.click("#theme")
    assert colors(page) == found["light"]
    assert page.text_content("#theme") == "Dark", "where the button leads"
    page.emulate_media(color_scheme="light")
    page.emulate_media(color_scheme="dark")
    assert colors(page) == found["light"], "what was chosen stays"


def test_the_theme_follows_the_system(opened):
    page = opened(24, "light")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "before => getComputedStyle(document.body).backgroundColor !== before", arg=before
    )
    assert page.text_content("#theme") == "Light", "where the button leads"


def test_a_narrow_window_has_all_of_it(opened):
    page = opened(24)
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
