"""The page at the root of a real server: what it shows is what the API answers."""

import os
import shutil
import time

import httpx
import pytest

from lorafold.serve.playground.page import page

CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMES)), None)
PROMPT = "19 -> "


def test_the_page_is_at_the_root_with_its_policy(client):
    found = client.http.get("/")
    html, headers = page()
    assert (found.status_code, found.content) == (200, html)
    for name, value in headers.items():
        assert found.headers[name] == value
    assert client.http.post("/", json={}).status_code == 405


def test_the_page_needs_no_key_and_what_it_asks_does(make_client):
    with make_client.make(keys=("secret",)) as client:
        assert client.http.get("/").status_code == 200
        assert client.http.get("/v1/models").status_code == 401


def test_a_router_is_one_of_the_models(make_client, library):
    def router(texts):
        return [{"roman": 0.5} for _ in texts]

    router.names = ["roman"]
    with make_client.make(library, router=router) as client:
        models = {card["id"]: card for card in client.http.get("/v1/models").json()["data"]}
        assert models["auto"]["parent"] == "demo"
        assert client.http.get("/v1/models/auto").json() == models["auto"]
        assert client.openai.models.retrieve("auto").id == "auto"
    with make_client.make(library) as client:
        assert "auto" not in {card["id"] for card in client.http.get("/v1/models").json()["data"]}
        assert client.http.get("/v1/models/auto").status_code == 404


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this system")
    with playwright.sync_playwright() as p:
        # As root there is no sandbox to be had.
        arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = p.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """opened(url) -> page; nothing must have gone wrong on it."""
    contexts, wrong = [], []

    def open_page(url):
        contexts.append(browser.new_context())
        contexts[-1].set_default_timeout(120_000)  # a busy machine is no failure
        found = contexts[-1].new_page()
        found.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else 0)
        found.on("pageerror", lambda e: wrong.append(str(e)))
        found.goto(url)
        found.locator(".setting").nth(1).wait_for()
        return found

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def test_answers_side_by_side_are_those_of_the_api(client, opened):
    found = opened(client.url)

    def part(setting, of, which=0):
        return found.locator(".setting").nth(setting).locator(of).nth(which)

    found.fill("#prompt", PROMPT)
    found.fill("#tokens", "12")
    part(1, ".name").select_option(label="roman")
    found.click("#add")
    part(2, ".c").fill("-0.5")
    part(2, ".rank").fill("2")
    found.click("#add")
    part(3, ".rank").fill("")
    part(3, ".c").fill("1")
    part(3, ".more").click()
    part(3, ".name", 1).select_option(label="a@b:c+d,e/f")
    part(3, ".weight", 1).fill("-0.3")
    found.click("#run")
    found.locator("#status", has_text="4 answers are there").wait_for()
    mix = [{"name": "roman", "scale": 1}, {"name": "a@b:c+d,e/f", "scale": -0.3}]
    expected = [
        client.text(PROMPT, max_tokens=12),
        client.text(PROMPT, max_tokens=12, model="roman"),
        client.text(PROMPT, max_tokens=12, model="roman@c=-0.5@r=2"),
        client.text(PROMPT, max_tokens=12, lora=mix),
    ]
    assert found.locator(".setting .text").all_text_contents() == expected
    assert len(set(expected)) > 2
    for speed in found.locator(".speed").all_text_contents():
        assert "12 tokens, first after" in speed


def test_a_chat_is_answered_as_by_the_api(client, opened):
    found = opened(client.url)
    found.select_option("#kind", "chat")
    found.fill("#prompt", PROMPT)
    found.fill("#tokens", "12")
    found.click("#run")
    found.locator("#status", has_text="2 answers are there").wait_for()
    model = found.locator(".setting").nth(1).locator(".name option:checked").text_content()
    ask = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "temperature": 0}
    expected = [
        client.post("/v1/chat/completions", model=m, **ask).json()["choices"][0]["message"][
            "content"
        ]
        for m in ("demo", model)
    ]
    assert found.locator(".setting .text").all_text_contents() == expected


def test_a_stopped_answer_frees_its_row(client, opened):
    found = opened(client.url)
    found.fill("#tokens", "200")
    found.click("#run")
    found.locator(".setting .text", has_text="s").nth(0).wait_for()
    found.evaluate("() => document.getElementById('stop').click()")  # nothing, if all has come
    client.settle()
    deadline = time.monotonic() + 30
    while any(client.service.pool.digests.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert client.service.pool.digests
    assert not any(client.service.pool.digests.values())


def test_the_page_works_below_a_prefix(client, opened):
    """Behind a proxy that has the server below a path of its own."""
    urls = []

    def passed_on(route):
        urls.append(route.request.url)
        path = route.request.url.partition("/some/where")[2]
        answer = httpx.request(
            route.request.method,
            f"{client.url}{path}",
            content=route.request.post_data_buffer,
            headers={"content-type": "application/json"},
        )
        route.fulfill(status=answer.status_code, body=answer.content, headers=dict(answer.headers))

    found = opened(client.url)
    found.route("**/some/where/**", passed_on)
    found.goto(f"{client.url}/some/where/")
    found.locator(".setting").nth(1).wait_for()
    found.fill("#tokens", "3")
    found.click("#run")
    found.locator("#status", has_text="2 answers are there").wait_for()
    assert all("/some/where/" in url for url in urls)
    assert len(urls) == 4
