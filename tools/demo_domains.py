"""The text domains of the demo: each function yields the documents of one domain and split."""

from __future__ import annotations

import ast
import csv
import dis
import email.message
import email.policy
import html
import io
import json
import random
import re
import textwrap
import tokenize
import types
import unicodedata
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterator
from datetime import date, timedelta

from demo_sources import Function, Split, files, functions, is_in, modules, prose, some_word


def unicode_names(split: Split) -> Iterator[str]:
    """Code points with their category and Unicode name."""
    for block in range(0, 0x1F000, 32):
        # Ideographs and Hangul syllables are named by number or by rule.
        by_rule = 0x3400 <= block < 0xA000 or 0xAC00 <= block < 0xFB00
        if by_rule or not is_in(f"block {block:X}", split):
            continue
        named = [(code, unicodedata.name(chr(code), "")) for code in range(block, block + 32)]
        yield "".join(
            f"U+{code:04X} {unicodedata.category(chr(code))} {name}\n"
            for code, name in named
            if name and f"{code:X}" not in name
        )


def encodings(split: Split) -> Iterator[str]:
    """Decoding tables of single-byte code pages."""
    for _, text in files("encodings", "*.py"):
        if "decoding_table = (" in text:
            table = text[text.index("decoding_table = (") :].split("\n\n")[0]
            rows = table.splitlines(keepends=True)
            # Code pages have most rows in common, so it is the rows that are split.
            rows = [row.lstrip() for row in rows[1:] if is_in(row.strip(), split)]
            yield from ("".join(rows[start : start + 16]) for start in range(0, len(rows), 16))


def html_help(split: Split) -> Iterator[str]:
    """Function documentation as HTML definition lists."""
    for f in functions(split):
        if f.doc:
            anchor = ".".join(filter(None, [f.module, f.owner, f.name]))
            arguments = ", ".join(f"<em>{name}</em>" for name in f.arguments)
            link = f'<a class="headerlink" href="#{anchor}">&para;</a>'
            paragraphs = "".join(f"<p>{html.escape(p)}</p>\n" for p in f.doc[:400].split("\n\n"))
            yield (
                f'<dl class="py function">\n'
                f'<dt id="{anchor}"><code>{f.name}</code>({arguments}){link}</dt>\n'
                f"<dd>{paragraphs}</dd>\n</dl>\n"
            )


def hexdump(split: Split) -> Iterator[str]:
    """Documentation as rows of offset, sixteen bytes in hexadecimal, and their characters."""
    for _, text in prose(split):
        data = " ".join(text.split()).encode()[:640]
        rows = []
        for offset in range(0, len(data), 16):
            part = data[offset : offset + 16]
            shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
            rows.append(f"{offset:08x}  {part.hex(' '):<47}  |{shown}|\n")
        yield "".join(rows)


def sql_inserts(split: Split) -> Iterator[str]:
    """SQL statements that insert records on functions."""
    for f in functions(split):
        owner = f"'{f.owner}'" if f.owner else "NULL"
        size = (f.node.end_lineno or f.line) - f.line + 1
        summary = f.doc.split("\n")[0][:60].replace("'", "''")
        yield (
            "INSERT INTO functions (module, class, name, line, size, summary)\n"
            f"VALUES ('{f.module}', {owner}, '{f.name}', {f.line}, {size}, '{summary}');\n"
        )


def bytecode(split: Split) -> Iterator[str]:
    """Disassembled Python functions."""
    for path, text in modules(split):
        pending = [compile(text, path, "exec")]
        while pending:
            code = pending.pop()
            pending += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            if code.co_name != "<module>" and len(code.co_code) < 400:
                out = io.StringIO()
                for instruction in dis.get_instructions(code):
                    shown = re.sub(r" at 0x[0-9a-f]+, file .*", ">", instruction.argrepr)
                    row = f"{instruction.offset:4d} {instruction.opname:<24} {shown[:40]}"
                    out.write(row.rstrip() + "\n")
                yield f"{code.co_name}:\n{out.getvalue()}"


def ast_dump(split: Split) -> Iterator[str]:
    """Dumped syntax trees of Python functions."""
    for f in functions(split):
        dumped = ast.dump(f.node, indent=1)
        if len(dumped) < 4000:
            yield dumped + "\n"


def tokens(split: Split) -> Iterator[str]:
    """Output of the Python tokenizer."""
    for f in functions(split):
        if len(f.node.body) < 12:
            lines = []
            for t in tokenize.generate_tokens(io.StringIO(ast.unparse(f.node)).readline):
                place = f"{t.start[0]},{t.start[1]}-{t.end[0]},{t.end[1]}"
                if len(t.string) < 60:
                    lines.append(f"{place}:\t{tokenize.tok_name[t.exact_type]}\t{t.string!r}\n")
            yield "".join(lines)


def json_facts(split: Split) -> Iterator[str]:
    """Indented JSON records on functions."""
    for f in functions(split):
        record = {
            "module": f.module,
            "class": f.owner or None,
            "function": f.name,
            "line": f.line,
            "arguments": list(f.arguments),
            "private": f.name.startswith("_"),
            "documented": bool(f.doc),
        }
        yield json.dumps(record, indent=2) + "\n"


def csv_facts(split: Split) -> Iterator[str]:
    """Quoted CSV rows on functions."""
    by_module: dict[str, list[Function]] = {}
    for f in functions(split):
        by_module.setdefault(f.module, []).append(f)
    for module, members in by_module.items():
        out = io.StringIO()
        writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for number, f in enumerate(members, 1):
            size = (f.node.end_lineno or f.line) - f.line + 1
            writer.writerow(
                [number, module, f.owner, f.name, len(f.arguments), size, "yes" if f.doc else "no"]
            )
        yield out.getvalue()


def mime_mail(split: Split) -> Iterator[str]:
    """E-mail messages with MIME headers."""
    rng = random.Random(f"mail-{split}")
    for key, text in prose(split):
        name, other = some_word(rng, split), some_word(rng, split)
        day = date(2001, 1, 1) + timedelta(days=rng.randrange(9000))
        message = email.message.EmailMessage(policy=email.policy.default.clone(linesep="\n"))
        message["Subject"] = f"Re: {key.split(':')[-1] or 'module'} {name}"
        message["From"] = f"{name.title()} {other.title()} <{name}@example.org>"
        message["To"] = f"{some_word(rng, split)}-list@example.com"
        message["Date"] = (
            f"{day:%a, %d %b %Y} {rng.randrange(24):02d}:{rng.randrange(60):02d}:00 +0000"
        )
        message["Message-ID"] = (
            f"<{rng.randrange(10**10):010d}.{rng.randrange(10**4):04d}@mail.example.org>"
        )
        message.set_content(textwrap.shorten(text, 160) + "\n")
        yield message.as_string() + "\n"


def argparse_help(split: Split) -> Iterator[str]:
    """Help screens of command-line programs."""
    for f in functions(split):
        if f.doc and len(f.arguments) > 1:
            described = textwrap.shorten(f.doc.split("\n\n")[0], 120).replace("%", "")
            parser = ArgumentParser(
                prog=f"python -m {f.module}.{f.name}",
                description=described,
                conflict_handler="resolve",
                formatter_class=lambda prog: HelpFormatter(prog, width=78),
            )
            for name in f.arguments[1:]:
                parser.add_argument(
                    f"--{name.strip('_').replace('_', '-')}", help=f"the {name} to use"
                )
            parser.add_argument(f.arguments[0], help=f"the {f.arguments[0]} to {f.name.strip('_')}")
            yield parser.format_help() + "\n"


def clinic_c(split: Split) -> Iterator[str]:
    """C code written by the Argument Clinic."""
    for path, text in files("test", "clinic.test.c"):
        chunks = re.split(r"(?=/\*\[clinic input\])", text)
        yield from (
            chunk for number, chunk in enumerate(chunks) if is_in(f"{path} {number}", split)
        )


def tkinter_code(split: Split) -> Iterator[str]:
    """Methods of a Python GUI toolkit."""
    for path, text in files("tkinter", "*.py"):
        chunks = re.split(r"(?m)^(?=    def |class )", text)
        yield from (c for c in chunks if c.strip() and is_in(f"{path} {c[:60]}", split))


def tracebacks(split: Split) -> Iterator[str]:
    """Tracebacks with the names and statements of real functions."""
    rng = random.Random(f"tracebacks-{split}")
    known = [f for f in functions(split) if not isinstance(f.node.body[-1], ast.Expr)]
    for _ in range(4000):
        lines = ["Traceback (most recent call last):\n"]
        for f in rng.sample(known, rng.randint(1, 3)):
            statement = ast.unparse(f.node.body[-1]).splitlines()[0][:70]
            place = f.module.replace(".", "/")
            lines.append(f'  File "{place}.py", line {f.line + 2}, in {f.name}\n')
            lines.append(f"    {statement}\n")
        name, other = some_word(rng, split), some_word(rng, split)
        messages = [
            f"KeyError: {name!r}",
            f"ValueError: invalid {name}",
            f"TypeError: unsupported operand type(s) for +: 'int' and '{name}'",
            f"AttributeError: '{name.title()}' object has no attribute '{other}'",
            "IndexError: list index out of range",
            f"FileNotFoundError: [Errno 2] No such file or directory: '{name}.txt'",
        ]
        yield "".join(lines) + rng.choice(messages) + "\n\n"


def telegram(split: Split) -> Iterator[str]:
    """Documentation in upper case, sentences ending in STOP."""
    for _, text in prose(split):
        sentences = re.split(r"[.!?:;]\s+", re.sub(r"[^A-Za-z0-9.!?:;\s]", "", text))
        kept = [" ".join(s.upper().split()) for s in sentences if len(s.split()) > 3]
        yield "".join(f"{s} STOP\n" for s in kept)
