"""What holds for every command: help, flags, exit status, errors in a line, the documentation."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import lorafold
from lorafold.cli import VERBS, main
from lorafold.cli._command import Settings, one_line
from lorafold.demo.model import data_dir

ROOT = Path(lorafold.__file__).parents[2]
DOCS = ROOT / "docs" / "cli.md"
OURS = [verb for verb in VERBS if verb != "demo"]  # its own tests run it
RUN = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from lorafold.cli import main; "


def loaded(verb):
    return main.get_command(click.Context(main), verb)


def demo_bases(here):
    """Two of the demo's bases at base-s and base-t."""
    shutil.copytree(data_dir() / "base", here / "base-s")
    shutil.copytree(data_dir() / "bases" / "deep", here / "base-t")


def options_of(command):
    """The options of a command, and of the commands in it."""
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    for one in (command, *inner):
        yield from (p for p in one.params if isinstance(p, click.Option))


def sections():
    """{verb: its text in the documentation}, what comes before under ""."""
    parts = re.split(r"^## ([\w-]+)$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def documented_lines():
    for verb, text in sections().items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            yield from ((verb, line) for line in block.splitlines())


def fresh(code, *args, **extra):
    """A new Python that runs `code` with the arguments."""
    command = [sys.executable, "-c", RUN + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **extra)


# Help


def test_help_lists_every_command_in_order(cli):
    ran = cli("--help")
    assert ran.code == 0
    listed = re.findall(r"^  ([\w-]+)  +\S", ran.out.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(VERBS)
    assert cli().out == ran.out  # no command at all is a question, not a mistake


def test_every_command_lives_in_a_file_of_its_name():
    files = {p.stem.replace("_", "-") for p in Path(lorafold.__file__).parent.glob("cli/[a-z]*.py")}
    assert files - {"demo"} == set(OURS)


@pytest.mark.parametrize("verb", OURS)
def test_help_of_a_command_ends_in_an_example(verb, cli):
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert ran.out == cli(verb, "-h").out
    title, example = ran.out.rstrip().splitlines()[-2:]
    assert title.strip() == "Example:"
    assert example.strip() == loaded(verb).example
    assert example.strip().startswith(f"lorafold {verb} ")


@pytest.mark.parametrize("verb", OURS)
def test_the_list_says_what_the_command_says(verb):
    assert loaded(verb).help.partition("\n")[0] == VERBS[verb]


@pytest.mark.parametrize("verb", OURS)
def test_the_example_runs(verb, here, cli, shapes):
    line = shlex.split(loaded(verb).example)[1:]
    if verb == "fold":
        line += ["--overwrite"]
    if verb == "serve":  # as it is, it runs until it is told to end
        pytest.importorskip("fastapi")
        line = ["serve", "demo", "--check"]
    if verb in ("verify-merge", "extract"):
        assert cli("merge-into", "base", "adapters/sql", "-o", "merged").code == 0
    if verb == "route":
        assert cli("route", "fit", "texts", "-o", "router").code == 0
    if verb == "add":
        assert cli("rm", "lib", "law").code == 0
    if verb == "align":
        pytest.importorskip("transformers")
        demo_bases(here)
    line = [str(p) for word in line for p in (sorted(here.glob(word)) if "*" in word else [word])]
    ran = cli(*line, "--json", "--verbose")
    if verb == "doctor":  # nobody serves here; tests/cli/test_doctor.py asks a server
        assert (ran.code, "can't be reached" in ran.err) == (2, True)
        return
    assert ran.code == 0, ran.err
    fields, tables = shapes[ran.json["kind"]]
    assert ran.json.keys() == {"kind", *fields, *tables}


# Documentation


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_and_option_is_documented(verb):
    if verb not in OURS:
        pytest.importorskip(f"lorafold.cli.{verb}")
    text = sections()[verb]
    shared = {"--json", "--verbose", "-v", "--quiet", "-q", "--debug", "--version", "-V"}
    for option in options_of(loaded(verb)):
        names = set(option.opts) - shared
        assert all(f"`{name}" in text for name in names), option.opts
    assert all(f"`{name}`" in sections()[""] for name in shared)


def test_no_option_is_documented_that_is_not_there():
    for verb, text in sections().items():
        if verb in OURS:
            own = options_of(loaded(verb))
            known = {name for p in own for name in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"--[a-z][a-z0-9-]*", text)) <= known, verb


def test_the_documented_lines_run(here, cli):
    count = 0
    for verb, line in documented_lines():
        words = shlex.split(line)
        assert words[:2] == ["lorafold", verb]
        if verb == "demo":
            continue
        words = [p for w in words[1:] for p in (sorted(here.glob(w)) if "*" in w else [w])]
        ran = cli(*words)
        if verb == "doctor":
            assert (ran.code, "can't be reached" in ran.err) == (2, True), line
            continue
        assert ran.code == 0, f"{line}: {ran.err}"
        count += 1
    assert count > len(OURS)


# Flags before and after


def test_flags_count_wherever_they_stand(world, cli):
    before = cli("--json", "ls", world / "lib")
    after = cli("ls", "--json", world / "lib")
    assert before.json == after.json
    assert before.code == after.code == 0


def test_version(cli):
    for line in (["--version"], ["-V"], ["info", "-V"], ["route", "fit", "--version"]):
        ran = cli(*line)
        assert (ran.code, ran.out) == (0, f"lorafold {lorafold.__version__}\n")


def commands():
    """Every command's words, those in groups too."""
    for verb in VERBS:
        inner = getattr(loaded(verb), "commands", {})
        yield from ([verb, name] for name in inner)
        yield from [] if inner else [[verb]]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_failure_of_any_command_is_json_where_that_is_asked_for(words, here, cli, shapes):
    """Wherever --json stands, and however much of the line can be understood."""
    assert "-".join(words) in shapes or words == ["info"]
    fields, _ = shapes["error"]
    for line in (["--json", *words, "--bogus"], [*words, "--bogus", "--json"]):
        ran = cli(*line)
        assert ran.json.keys() == {"kind", *fields}
        assert (ran.json["kind"], ran.json["type"]) == ("error", "NoSuchOption")
        assert (ran.code, ran.json["status"]) == (2, 2)
        assert ran.err == f"error: {ran.json['message']}\n"
    ran = cli(*words, "--bogus", "--", "--json")  # that is no flag
    assert (ran.code, ran.out) == (2, "")
    params = {p.name: p for p in loaded(words[0]).params}
    assert {"json", "verbose", "quiet", "debug", "version"} <= params.keys()


@pytest.mark.parametrize(
    ("line", "error", "status"),
    [
        ("ls nowhere", "FileError", 2),
        ("diff lib:sqk lib:sql", "UnknownNameError", 2),
        ("fold adapters -o other --retention 0.9", "MismatchError", 2),
        ("refold lib --tolerance 1e-9", "ToleranceError", 1),
    ],
)
def test_an_error_says_its_type_and_status(line, error, status, here, cli):
    ran = cli(*line.split(), "--json")
    assert (ran.code, ran.json["type"], ran.json["status"]) == (status, error, status)


@pytest.mark.parametrize(
    ("line", "kind", "status"),
    [
        ("info adapters", "adapters", 0),
        ("info lib", "library", 0),
        ("info adapters/sql", "adapter", 0),
        ("diff adapters/sql lib:sql", "diff", 0),
        ("anatomy adapters/sql", "anatomy", 0),
        ("fold adapters -o other", "fold", 0),
        ("merge-into base far -o merged", "unplaced", 1),
        ("verify-merge base adapters/sql base", "verify-merge", 1),
        ("transfer adapters/sql --shape q_proj=4x4 -o out", "transfer", 0),
    ],
)
def test_tables_of_modules_are_for_who_asks(line, kind, status, here, cli, make_adapter, shapes):
    """What is found is one object, also where the check fails."""
    paths = {"no.where": (4, 4), "model.layers.0.self_attn.q_proj": (24, 16)}
    lorafold.save(make_adapter(paths, 2), "far")
    ran = cli(*line.split(), "--json")
    assert (ran.code, ran.json["kind"], bool(ran.err)) == (status, kind, bool(status))
    assert ran.json.keys() == {"kind", *shapes[kind][0]}
    assert "per_module" not in ran.out
    if kind == "transfer":
        assert "modules" not in ran.json["adapters"][0]["report"]


def test_quiet_prints_errors_and_json_alone(here, cli):
    for line in ("info adapters", "ls lib", "verify lib", "diff lib:sql lib:law", "rm lib law"):
        assert (cli(*line.split(), "-q").out, cli("-q", *line.split()).code) in (("", 0), ("", 2))
    assert cli("ls", "lib", "-q", "--json").json["kind"] == "ls"
    ran = cli("ls", "nowhere", "--quiet")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    ran = cli("-v", "ls", "lib", "-q")
    assert (ran.code, "exclude each other" in ran.err) == (2, True)


def test_long_tables_end_unless_verbose(here, cli):
    adapters = {f"a{k:02}": lorafold.load("adapters/sql") for k in range(23)}
    lorafold.fold(adapters, "many", tolerance=0).close()
    short = cli("verify", "many", *(f"--name=a{k:02}=adapters/sql" for k in range(23)))
    assert short.out.count("right") - 1 == 20
    assert short.out.endswith("and 3 more: --verbose\n")
    assert "a22" in cli("ls", "many").out  # which is what it is for


# Failures


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("infoo x", "did you mean 'info'"),
        ("info", "Missing argument 'PATH...'"),
        ("info nowhere", "no such file or directory: 'nowhere'"),
        ("info adapters/sqk", "did you mean 'adapters/sql'? (for an id on the Hub"),
        ("ls nowhere", "nowhere does not exist"),
        ("ls adapters/sql", "is not a library"),
        ("diff adapters/sql lib:sqk", "did you mean 'sql'"),
        ("diff adapters/sql lib", "name one of its adapters, as lib:NAME"),
        ("fold -o other", "give adapters, or NAME=SOURCE with --name"),
        ("fold adapters", "Missing option '-o'"),
        ("fold adapters -o lib", "give --overwrite to replace it"),
        ("fold adapters -o other --tolerance 0.1 --rank 2", "exclude each other"),
        ("fold adapters -o other --form odd", "'odd' is not one of"),
        ("fold adapters -o other --bits 9", "bits must be"),
        ("fold adapters -o other --memory much", "memory must be"),
        ("fold adapters -o other --name sql", "is not NAME=SOURCE"),
        ("fold adapters --name sql=adapters/law -o other", "both named 'sql': give one"),
        ("fold adapters --name a=adapters/sql --name a=adapters/law -o x", "given twice"),
        ("fold adapters -o other --retention 0.9", "--retention needs --score"),
        ("fold adapters -o x --retention 0.9 --score json", "is not MODULE:FUNCTION"),
        ("fold adapters -o x --retention 0.9 --score json:nope", "has no attribute 'nope'"),
        ("fold adapters -o x --retention 0.9 --score json:__name__", "is not a function"),
        ("resize adapters/sql out", "give exactly one of"),
        ("resize adapters/sql adapters/law --rank 1", "give --overwrite to replace it"),
        ("check adapters/sql --base nowhere", "no such folder: 'nowhere'"),
        ("merge-into base adapters/sql", "Missing option '-o'"),
        ("merge-into nowhere adapters/sql -o out", "no such folder: 'nowhere'"),
        ("merge-into base adapters/sql -o lib", "not a model in safetensors: it holds"),
        ("merge-into base adapters/sql -o adapters --overwrite", "holds the source adapters/sql"),
        ("merge-into base lib:sql -o adapters --overwrite", "not a model in safetensors"),
        ("resize adapters/sql adapters/sql --rank 1 --overwrite", "is the source adapters/sql"),
        ("resize lib:sql lib/sql --rank 1 --overwrite", "lies in the source lib"),
        ("resize adapters/sql adapters/sql/../sql/r1 --rank 1", "lies in the source"),
        ("resize adapters/sql lib --rank 1 --overwrite", "lib won't be overwritten: it is not an"),
        ("unfold lib -o lib", "lies in the source lib"),
        ("fold adapters -o adapters --overwrite", "adapters holds the source adapters/law"),
        ("fold adapters/sql -o adapters/law --overwrite", "law won't be overwritten: it is not a"),
        ("merge-into base lib:sqk -o out", "did you mean 'sql'"),
        ("merge-into base adapters/sql -o out -c nan", "c must be a finite number"),
        ("merge-into base adapters/sql -o base/out", "write elsewhere"),
        ("merge-into base/model.safetensors adapters/sql -o out", "give the folder of the base"),
        ("unfold lib sqk -o out", "did you mean 'sql'"),
        ("add lib adapters/sql", "give --replace, or another --name"),
        ("add lib adapters --name one", "--name is for one adapter"),
        ("rm lib law nothing", "no adapter 'nothing'"),
        ("verify lib adapters/sql --name odd=adapters/law", "no adapter 'odd'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(line, says, here, cli):
    state = sorted(str(p) for p in here.rglob("*"))
    ran = cli(*line.split())
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert says in ran.err
    assert sorted(str(p) for p in here.rglob("*")) == state  # nothing was written


def test_debug_shows_the_traceback(world, cli):
    for line in (["--debug", "ls", "nowhere"], ["ls", "nowhere", "--debug"]):
        ran = cli(*line)
        assert ran.code == 2
        assert "Traceback" in ran.err
        assert "FileError" in ran.err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file"),
        (ZeroDivisionError("by\nzero"), "unexpected ZeroDivisionError: by zero (--debug"),
        (MemoryError(), "unexpected MemoryError"),
    ],
)
def test_any_error_is_one_line(error, says, cli, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(loaded("ls"), "callback", fail)
    ran = cli("ls", "lib")
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.strip().count("\n") == 0


def test_a_warning_is_one_line(cli, monkeypatch):
    import warnings

    def warn(**_):
        warnings.simplefilter("always")
        warnings.warn("two\nlines", UserWarning, stacklevel=1)

    monkeypatch.setattr(loaded("ls"), "callback", warn)
    assert cli("ls", "lib").err == "warning: two lines\n"


def test_a_group_alone_tells_its_commands(cli):
    ran = cli("route")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == cli("route", "--help").out
    ran = cli("route", "aks", "x")
    assert (ran.code, "there is no command 'aks'; did you mean 'ask'?" in ran.err) == (2, True)


def test_one_line_shows_control_characters_escaped():
    assert one_line("a\nb\x1b[31m\t") == "a b\\x1b[31m"
    assert one_line("żółw 🐢 ΔW") == "żółw 🐢 ΔW"


def test_used_as_a_library_the_group_raises(world):
    assert main.main(["ls", str(world / "lib")], standalone_mode=False, obj=Settings()) is None
    with pytest.raises(lorafold.FileError):
        main.main(["ls", "nowhere"], standalone_mode=False)


# Real processes


def test_help_is_quick_because_it_imports_no_torch():
    code = (
        "main(['--help'], standalone_mode=False); "
        "print({'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules), file=sys.stderr)"
    )
    done = fresh(code)
    assert done.returncode == 0
    assert done.stderr.strip() == "set()"
    assert "Commands:" in done.stdout
    for verb in OURS:
        main_code = f"main([{verb!r}, '--help'], standalone_mode=False); "
        assert "'torch'" not in fresh(main_code + "print(set(sys.modules))").stdout


@pytest.mark.parametrize(
    ("line", "status"),
    [("ls lib", 0), ("ls nowhere", 2), ("rm lib sql", 0), ("rm lib sqk", 2), ("info lib", 0)]
    + [("ls lib --json", 0), ("info lib --json", 0), ("info lib -q", 0)],
)
def test_what_reads_lists_alone_waits_for_no_torch(line, status, here):
    """Of its own: a shard that is mostly dead is copied, and what is in it as well."""
    code = "sys.argv[0] = 'lorafold'\ntry: main()\nexcept SystemExit as e: print(e.code, "
    code += "{'torch', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = fresh(code, *line.split(), cwd=here)
    assert done.stdout.splitlines()[-1] == f"{status} set()", done.stderr


def test_a_process_ends_with_the_status_and_one_line():
    done = fresh("main()", "ls", "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("nowhere does not exist\n")
    assert done.stderr.count("\n") == 1


def test_into_a_pipe_nothing_is_cut_and_no_progress_shown(world):
    import os

    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    code = "import lorafold.cli._output as o; o.DELAY, o.EVERY = 0, 1e9; main()"
    done = fresh(code, "info", world / "lib", "--verbose", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "model.layers.0.self_attn.q_proj" in done.stdout
    assert "\x1b" not in done.stdout
    out = fresh(code, "verify", world / "lib", world / "adapters", env=env)
    assert (out.returncode, out.stderr) == (0, "")
    slow = "import lorafold.cli._output as o; o.EVERY = 0; main()"  # all of it takes too long
    out = fresh(slow, "verify", world / "lib", world / "adapters", env=env)
    lines = out.stderr.splitlines()
    assert lines[0] == "comparing: 0%, law"
    assert all(
        re.fullmatch(r"comparing: \d+%(, about \d+ s left)?, (law|poems|sql)", line)
        for line in lines
    )
    assert fresh(slow, "verify", world / "lib", world / "adapters", "-q", env=env).stderr == ""


def test_python_runs_the_package(world):
    run = [sys.executable, "-m", "lorafold"]
    env = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    done = subprocess.run([*run, "-V"], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == f"lorafold {lorafold.__version__}\n"
    done = subprocess.run([*run, "ls", "no"], capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {Path.cwd() / 'no'} does not exist\n")


def test_output_survives_a_terminal_without_the_letters(world):
    done = subprocess.run(
        [sys.executable, "-c", RUN + "main()", "info", str(world / "adapters" / "sql")],
        capture_output=True,
        env={"PYTHONIOENCODING": "latin-1", "PATH": ""},
        check=False,
    )
    assert done.returncode == 0
    assert b"norm \\u2016\\u0394W\\u2016" in done.stdout


def test_what_is_not_ours_survives_every_command(here, cli):
    """`--overwrite` replaces what is of the kind being written, and nothing else in its folder."""
    lines = {
        "fold adapters -o out": "out",
        "resize adapters/sql out --rank 2": "out",
        "unfold lib sql -o out": "out/sql",
        "merge-into base adapters/sql -o out": "out",
    }
    for k, (command, target) in enumerate(lines.items()):
        line, mine = command.replace("out", f"out{k}"), here / target.replace("out", f"out{k}")
        mine.mkdir(parents=True)
        assert cli(*line.split()).code == 0  # an empty directory is no hindrance
        (mine / "thesis.tex").write_text("years")
        assert cli(*line.split()).code == 2
        assert cli(*line.split(), "--overwrite").code == 0
        assert (mine / "thesis.tex").read_text() == "years"
        for path in mine.iterdir():
            if path.name != "thesis.tex":
                path.unlink()
        ran = cli(*line.split(), "--overwrite")
        assert ran.code == 2
        assert "won't be overwritten: it is not a" in ran.err
        assert "it holds 'thesis.tex'" in ran.err
        assert [p.name for p in mine.iterdir()] == ["thesis.tex"]
