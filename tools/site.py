"""What the documentation site has beside docs/: the README as its front, the changelog, the API.

A hook of mkdocs (mkdocs.yml names it, `make docs` builds). The reference lists the public names of
`lorafold`, its errors and `lorafold.train` as they are now; what it says of each is the docstring.
Links to what is no page (scripts of benchmarks/, notebooks) become the names of those files.
"""

from __future__ import annotations

import inspect
import os.path
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import lorafold

ROOT = Path(__file__).parents[1]
# Pages that lie outside docs/, and where the site has them.
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
HOMES = {page: path for path, page in MOVED.items()}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def reference(module: ModuleType) -> str:
    """The reference of a module's public classes and functions, as mkdocstrings takes it."""
    parts = [f"# {module.__name__}", (inspect.getdoc(module) or "").partition("\n\n")[0]]
    for name in sorted(module.__all__, key=str.lower):
        value = getattr(module, name)
        if isinstance(value, ModuleType):  # a package that is its verb; other modules have pages
            value = getattr(value, name, None)
        elsewhere = name in lorafold.train.__all__ or hasattr(lorafold.errors, name)
        if not callable(value) or (module is lorafold and elsewhere):
            continue
        parts.append(
            f"::: {value.__module__}.{value.__qualname__}\n    options:\n"
            f'      heading: "{module.__name__}.{name}"\n      toc_label: "{name}"'
        )
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what does not lie in docs/."""
    pages = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in MOVED.items()}
    pages["reference/lorafold.md"] = reference(lorafold)
    pages["reference/train.md"] = reference(lorafold.train)
    for name in ("errors", "plot"):
        home = getattr(lorafold, name).__name__
        pages[f"reference/{name}.md"] = f"# lorafold.{name}\n\n::: {home}\n"
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Have links between pages lead where the site has them."""
    uri = page.file.src_uri
    here = os.path.dirname(HOMES.get(uri, f"docs/{uri}"))

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        if "://" in target:
            return link[0]
        path = os.path.normpath(os.path.join(here, target))
        there = MOVED.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if files.get_file_from_path(there):
            return f"[{text}]({os.path.relpath(there, os.path.dirname(uri))}{anchor or ''})"
        return text if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK.sub(moved, markdown)
