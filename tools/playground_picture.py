"""Draw docs/playground.png: the page of `lorafold serve` on the demo, as a browser shows it.

    python tools/playground_picture.py

Needs playwright (extra `test`) and a Chromium of the system.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

import lorafold as lf
from lorafold.demo.model import data_dir

PICTURE = Path(__file__).parents[1] / "docs" / "playground.png"
PROMPT = "1994 -> "
# Of each setting: adapters with their weights, and c.
SETTINGS = [({}, 1.0), ({"roman": 1.0}, 1.0), ({"number_words": 0.7, "uppercase": 0.5}, 1.25)]


def fill(page: Page) -> None:
    """Ask for the settings, and wait for the answers."""
    page.fill("#prompt", PROMPT)
    page.fill("#tokens", "24")
    settings = page.locator(".setting")
    settings.nth(1).wait_for()
    while settings.count() < len(SETTINGS):
        page.click("#add")
    for i, (mix, c) in enumerate(SETTINGS):
        one = settings.nth(i)
        while one.locator(".part").count() < max(1, len(mix)):
            one.locator(".more").click()
        for k, (name, weight) in enumerate(mix.items()):
            one.locator(".name").nth(k).select_option(label=name)
            one.locator(".weight").nth(k).fill(str(weight))
        one.locator(".c-number").fill(str(c))
        one.locator(".c-number").press("Enter")
    page.click("#run")
    page.locator("#status", has_text="answers are there").wait_for()


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("there is no Chromium on this system")
    with tempfile.TemporaryDirectory() as folder:
        lf.fold(f"{data_dir()}/adapters/*", f"{folder}/lib", tolerance=0.1).close()
        line = [sys.executable, "-m", "lorafold", "serve", "demo", "--library", f"{folder}/lib"]
        line += ["--port", "0", "--json", "--cpu"]
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            told = ""
            while not told.rstrip().endswith("}"):
                told += server.stdout.readline()
            with sync_playwright() as p:
                root = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = p.chromium.launch(executable_path=chromium, args=root)
                page = browser.new_page(viewport={"width": 1180, "height": 800})
                page.goto(json.loads(told)["url"])
                fill(page)
                page.screenshot(path=PICTURE, full_page=True)
            server.terminate()


if __name__ == "__main__":
    main()
