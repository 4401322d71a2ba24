"""The page without a browser: whole, small, and under a policy that names its own two parts."""

import base64
import hashlib
import re

from lorafold.serve.playground.page import page


def test_the_policy_allows_what_is_in_the_page_and_nothing_else():
    html, headers = page()
    text = html.decode()
    policy = dict(
        part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    for tag, source in (("script", "script-src"), ("style", "style-src")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in inside]
        assert policy[source].split() == [f"'sha256-{h}'" for h in hashes]
        assert len(inside) == 1
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_it_names_no_other_place():
    text = page()[0].decode()
    assert not re.search(r"https?:|//[a-z]+\.|url\(", text)
    assert not re.search(r"<\w[^>]* (style|on\w+)=", text)
    assert len(text) < 40_000


def test_the_script_never_writes_html():
    script = re.search(r"<script>(.*)</script>", page()[0].decode(), re.DOTALL)[1]
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "DOMParser"):
        assert way not in script
