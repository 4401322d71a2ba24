"""The page in a browser: answers side by side, by mouse and by keys; names and answers are text.

The browser is the system's Chromium; without one these tests are skipped.
"""

import os
import shutil
import threading

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMES)), None)

TIMEOUT = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this system")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        # As root there is no sandbox to be had.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """opened(scheme, wrong=…) -> page; at the end, nothing else must have gone wrong on any."""
    contexts, wrong, asked = [], [], []
    expected = []

    def open_page(scheme="light", fails=False):
        context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)  # a busy machine is no failure
        page = context.new_page()
        expected.append(fails)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else 0)
        page.on("pageerror", lambda e: wrong.append(f"error of the page: {e}"))
        page.on("dialog", lambda d: (wrong.append(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(server.url)
        if not fails:
            page.locator(".setting").nth(1).wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    if any(expected):  # a browser logs every status above 399
        wrong = [text for text in wrong if not text.startswith("Failed to load resource")]
    assert not wrong
    assert all(url.startswith((server.url, "data:")) for url in asked)


def run(page, done="answers are there"):
    page.click("#run")
    page.locator("#status", has_text=done).wait_for()


def texts(page):
    return page.locator(".setting .text").all_text_contents()


def part(page, setting, of, which=0):
    return page.locator(".setting").nth(setting).locator(of).nth(which)


def test_it_begins_with_the_base_and_an_adapter(opened, server):
    page = opened()
    assert page.text_content("#served") == f"the base with {len(server.names)} adapters"
    assert page.locator(".setting h2").all_text_contents() == ["Setting 1", "Setting 2"]
    page.fill("#prompt", "go on: ")
    server.answers = lambda body: "with one" if body["model"] == "sql" else "alone"
    run(page)
    assert texts(page) == ["alone", "with one"]
    assert page.locator(".setting .asked").all_text_contents() == ["go on: "] * 2
    base, one = sorted(server.asked, key=lambda body: "c" in body)
    assert not {"lora", "c", "rank", "seed"} & base.keys()
    assert not {"lora", "rank", "seed"} & one.keys()
    assert (base["model"], one["model"]) == ("the base", "sql")
    assert base["prompt"] == one["prompt"] == "go on: "
    assert one["c"] == 1
    assert base["stream"] is True
    assert part(page, 0, ".ran").text_content() == "the base, no adapter"
    assert part(page, 1, ".ran").text_content() == "sql, c = 1, all ranks, on the base"
    speed = part(page, 1, ".speed").text_content()
    assert "tokens/s, 8 tokens, first after" in speed
    assert "ended by length" in speed


def test_mixes_the_dial_and_ranks(opened, server):
    page = opened()
    page.click("#add")
    assert page.locator(".setting").count() == 3
    part(page, 2, ".more").click()
    part(page, 2, ".name", 1).select_option(label="polite")
    part(page, 2, ".weight", 0).fill("0.7")
    part(page, 2, ".weight", 1).fill("-0.3")
    part(page, 2, ".rank").fill("4")
    dial, number = part(page, 2, ".c"), part(page, 2, ".c-number")
    assert (dial.get_attribute("min"), dial.get_attribute("max")) == ("-2", "2")
    dial.fill("-1.5")
    assert number.input_value() == "-1.5"
    number.fill("0.5")
    assert dial.input_value() == "0.5"
    page.fill("#tokens", "12")
    page.fill("#temperature", "0.8")
    page.fill("#seed", "7")
    part(page, 2, ".one").click()
    page.locator("#status", has_text="1 answer is there").wait_for()
    assert server.asked == [
        {
            "model": "the base",
            "prompt": page.input_value("#prompt"),
            "max_tokens": 12,
            "temperature": 0.8,
            "seed": 7,
            "stream": True,
            "stream_options": {"include_usage": True},
            "lora": [{"name": "sql", "scale": 0.7}, {"name": "polite", "scale": -0.3}],
            "c": 0.5,
            "rank": 4,
        }
    ]
    ran = part(page, 2, ".ran").text_content()
    assert ran == "0.7 × sql + −0.3 × polite, c = 0.5, rank 4, on the base"
    part(page, 2, ".less", 0).click()
    assert page.locator(".setting").nth(2).locator(".part").count() == 1
    part(page, 2, ".copy").click()
    assert part(page, 3, ".name").input_value() == part(page, 2, ".name").input_value()
    assert part(page, 3, ".rank").input_value() == "4"
    part(page, 0, ".remove").click()
    assert page.locator(".setting").count() == 3
    for _ in range(5):
        page.click("#add")
    assert page.locator(".setting").count() == 8
    assert page.is_disabled("#add")


def test_a_message_of_a_chat(opened, server):
    page = opened()
    page.select_option("#kind", label="a message of a chat")
    page.fill("#prompt", "Hello?")
    server.answers = lambda body: "<b>Hi</b>."
    run(page)
    assert set(server.paths) == {"/v1/chat/completions"}
    for body in server.asked:
        assert body["messages"] == [{"role": "user", "content": "Hello?"}]
        assert "prompt" not in body
    assert texts(page) == ["<b>Hi</b>."] * 2
    assert page.locator(".asked").all_text_contents() == [""] * 2
    assert "10 tokens" in part(page, 0, ".speed").text_content()
    page.select_option("#kind", index=0)
    run(page)
    assert set(server.paths) == {"/v1/chat/completions", "/v1/completions"}


def test_names_and_answers_are_never_markup(opened, server):
    page = opened()
    nasty = server.names[2:]
    offered = part(page, 1, ".name").locator("option").evaluate_all("all => all.map(o => o.text)")
    assert offered[3:] == [" ".join(name.split()) for name in nasty]
    server.answers = lambda body: "".join(nasty) + body["model"]
    for i, name in enumerate(nasty):
        part(page, 1, ".name").select_option(index=i + 3)
        run(page)
        assert [body["model"] for body in server.asked if "c" in body][-1] == name
        assert texts(page)[1] == "".join(nasty) + name
        assert name in part(page, 1, ".ran").text_content()
    page.fill("#prompt", nasty[0])
    run(page)
    assert part(page, 1, ".asked").text_content() == nasty[0]
    inside = "main img, main script, main b, .answer *:not(pre):not(span)"
    assert page.query_selector(inside) is None


def test_an_error_is_shown_as_text(opened, server):
    page = opened(fails=True)
    page.locator(".setting").nth(1).wait_for()
    server.status, server.problem = 400, "<img src=x onerror=alert(1)> is no c"
    page.click("#run")
    page.locator("#status", has_text="0 of 2 answers").wait_for()
    for problem in page.locator(".problem").all():
        assert problem.is_visible()
        assert problem.text_content() == server.problem
    assert page.query_selector("main img") is None
    server.status = 200
    run(page)
    assert not page.locator(".problem").nth(0).is_visible()


def test_an_error_within_a_stream_is_shown(opened, server):
    page = opened()
    server.pieces = lambda body: [
        b'data: {"choices": [{"text": "so far"}]}\r\n\r\n',
        b'data: {"error": {"message": "the engine has failed"}}\r\n\r\n',
    ]
    page.click("#run")
    page.locator("#status", has_text="0 of 2 answers").wait_for()
    assert texts(page) == ["so far"] * 2
    assert page.locator(".problem").all_text_contents() == ["the engine has failed"] * 2


def test_events_are_read_however_they_are_cut(opened, server):
    page = opened()
    whole = "ein Übergang, ΔW ≈ 𝛼·B·A\n\nzwei Zeilen"
    for end in ("\n\n", "\r\n\r\n"):
        server.pieces = lambda body, end=end: (
            bytes([b]) for piece in server.events(body, whole, end) for b in piece
        )
        run(page)
        assert texts(page) == [whole] * 2


def test_whom_the_server_chose_is_said(opened, server):
    page = opened()
    server.pieces = lambda body: server.events({**body, "model": "<b>sql</b>:0.7"}, "yes")
    run(page)
    assert part(page, 0, ".ran").text_content() == (
        "the base, no adapter, answered by <b>sql</b>:0.7"
    )


def test_answers_stream_and_can_be_stopped(opened, server):
    hold = threading.Event()
    server.pieces = lambda body: server.events(body, "abcdefgh" * 40, hold=hold)
    page = opened()
    page.click("#run")
    page.locator(".text", has_text="abc").nth(1).wait_for()
    assert texts(page) == ["abc", "abc"]  # what came until now, while more is on the way
    assert part(page, 0, ".answer").get_attribute("aria-busy") == "true"
    page.click("#stop")
    page.locator("#status", has_text="0 of 2 answers").wait_for()
    hold.set()
    assert "stopped" in part(page, 0, ".speed").text_content()
    assert part(page, 0, ".answer").get_attribute("aria-busy") == "false"
    assert page.is_disabled("#stop")


def test_a_setting_can_run_whenever_it_changes(opened, server):
    page = opened()
    part(page, 1, ".c").fill("0.5")
    assert not server.asked
    page.check("#live")
    part(page, 1, ".c").fill("-1")
    page.locator("#status", has_text="1 answer is there").wait_for()
    assert [body["c"] for body in server.asked] == [-1]


def test_numbers_out_of_range_are_not_sent(opened, server):
    page = opened()
    for field in ("#tokens", "#temperature"):
        before = page.input_value(field)
        page.fill(field, "-1")
        page.click("#run")
        page.fill(field, before)
    part(page, 1, ".rank").fill("0")
    page.click("#run")
    assert page.locator(":focus").get_attribute("class") == "rank"
    assert not server.asked


def test_a_key_is_asked_for_where_one_is_needed(opened, server):
    server.key = "secret"
    page = opened(fails=True)
    page.locator("#served", has_text="no key, or a wrong one <i>here</i>").wait_for()
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.locator(".setting").nth(1).wait_for()
    run(page)
    assert len(server.asked) == 2
    assert page.evaluate("() => localStorage.length + sessionStorage.length") == 0


def test_all_of_it_by_keys(opened, server):
    """Tab reaches every control in the order in which they are seen; keys do what clicks do."""
    page = opened()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "() => document.activeElement.getAttribute('aria-label')"
                " ?? document.activeElement.labels?.[0]?.textContent.trim()"
                " ?? document.activeElement.textContent"
            )
        )
    expected = [
        *(
            "Switch between light and dark",
            "Prompt",
            "Asked as",
            "Example",
            "Tokens",
            "Temperature",
            "Seed",
        ),
        *("Run all", "Add a setting", "Run a setting when it changes"),
        *("Copy setting 1", "Remove setting 1", "Adapter 1 of setting 1"),
        *("Weight of adapter 1 of setting 1", "Take out adapter 1 of setting 1"),
        *("Add an adapter to setting 1", "Strength c", "Strength c of setting 1, as a number"),
        *("Rank", "Run setting 1", "Answer 1", "Copy setting 2"),
    ]
    assert reached[: len(expected)] == expected
    page.focus("#c-2")
    page.keyboard.press("ArrowLeft")
    assert part(page, 1, ".c-number").input_value() == "0.95"
    page.keyboard.press("Home")
    assert part(page, 1, ".c-number").input_value() == "-2"
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.locator("#status", has_text="2 answers are there").wait_for()
    assert [body["c"] for body in server.asked if "c" in body] == [-2]
    part(page, 0, ".remove").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == (
        "Remove setting 2"
    )
    part(page, 0, ".remove").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "add"


def test_everything_that_is_chosen_has_a_name(opened):
    page = opened()
    page.click("#add")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter(
            e => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim())
        ).map(e => e.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def contrast(a, b):
    def luminance(color):
        shares = [v / 255 for v in color]
        found = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
        return 0.2126 * found[0] + 0.7152 * found[1] + 0.0722 * found[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_both_themes(opened, server, scheme):
    page = opened(scheme)
    run(page)
    colors = page.evaluate(
        """() => ["body", "#served", "label", ".asked", ".answer .text", "#run", ".facts dt"].map(
            of => {
                const e = document.querySelector(of);
                let behind = e;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
                    behind = behind.parentElement;
                return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor].map(
                    c => c.match(/[0-9]+/g).slice(0, 3).map(Number));
            })"""
    )
    for text, ground in colors:
        assert contrast(text, ground) >= 4.5, (scheme, text, ground)
    dark = sum(colors[0][1]) < 382
    assert dark == (scheme == "dark")
    page.click("#theme")
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 382) != dark


def test_a_narrow_window_has_all_of_it(opened, server):
    server.answers = lambda body: "x" * 500
    page = opened()
    page.set_viewport_size({"width": 360, "height": 800})
    run(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_a_thousand_adapters(opened, server):
    server.names = [f"adapter-{i:04}" for i in range(1_000)]
    page = opened()
    assert page.text_content("#served") == "the base with 1000 adapters"
    part(page, 1, ".name").select_option(label="adapter-0777")
    run(page)
    assert [body["model"] for body in server.asked if "c" in body] == ["adapter-0777"]
