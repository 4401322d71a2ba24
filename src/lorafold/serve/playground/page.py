"""The page: one HTML file that asks nothing but the server it came from.

Its policy allows the two scripts and styles in it by their hashes, and requests to where it came
from. Names and answers never become HTML: the script writes all of them as text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page, and the headers to send it with; the same for every server.

    Examples:
        >>> html, headers = page()
        >>> html[:15], headers["Content-Type"]
        (b'<!DOCTYPE html>', 'text/html; charset=utf-8')
    """
    style, script = _beside("page.css"), _beside("page.js")
    html = _beside("page.html").replace("/* style */", style).replace("/* script */", script)
    policy = _POLICY.format(script=_hash(script), style=_hash(style))
    return html.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # another version of the server may have another page
    }


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source of a policy: this very text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
