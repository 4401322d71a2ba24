"""Command lines with URLs where they have paths."""

import json

import pytest

import lorafold as lf


@pytest.fixture
def there(at, world):
    at.put(world / "adapters", "adapters")
    return at


def test_a_library_is_made_and_kept_at_a_url(there, here, cli):
    url = there.url
    done = cli("fold", f"{url}/adapters/*", "-o", f"{url}/lib", "--json")
    assert done.code == 0, done.err
    assert done.json["path"] == f"{url}/lib"
    assert cli("rm", f"{url}/lib", "law").code == 0
    assert cli("add", f"{url}/lib", f"{url}/adapters/law", "--name", "laws").code == 0
    listed = cli("ls", f"{url}/lib", "--json").json
    assert [row["name"] for row in listed["adapters"]] == ["poems", "sql", "laws"]
    assert cli("info", f"{url}/lib").code == 0
    assert cli("refold", f"{url}/lib", "--tolerance", "0.3").code == 0
    named = [f"--name=laws={url}/adapters/law", f"{url}/adapters/sql", f"{url}/adapters/poems"]
    checked = cli("verify", f"{url}/lib", *named, "--json")
    assert checked.code == 0, checked.err
    assert checked.json["ok"]
    assert cli("repair", f"{url}/lib").code == 0
    assert cli("unfold", f"{url}/lib", "-o", f"{url}/out").code == 0
    assert {name.partition("/")[0] for name in there.files("out")} == {"poems", "sql", "laws"}
    assert cli("unfold", f"{url}/lib", "sql", "-o", here / "out").code == 0
    assert lf.load(here / "out" / "sql").digest == lf.load(f"{url}/out/sql").digest


def test_one_adapter_at_a_url_is_read_and_written(there, here, cli):
    url = there.url
    lf.fold(here / "adapters", f"{url}/lib")
    assert cli("info", f"{url}/adapters/sql", "--json").json["path"] == f"{url}/adapters/sql"
    assert cli("info", f"{url}/lib:sql").code == 0
    assert len(cli("info", f"{url}/adapters", "--json").json["adapters"]) == 3
    assert cli("check", f"{url}/lib:sql", "--base", "base").code == 0
    assert cli("resize", f"{url}/lib:sql", "--rank", "1", f"{url}/small").code == 0
    assert lf.load(f"{url}/small").rank == 1
    assert cli("resize", f"{url}/adapters", "--rank", "1", f"{url}/all").code == 0
    assert lf.load(f"{url}/all/poems").rank == 1
    merged = cli("merge", f"{url}/adapters/*", "-o", f"{url}/merged")
    assert merged.code == 0, merged.err
    assert lf.load(f"{url}/merged").rank > 4
    assert cli("merge", f"{url}/adapters/*", "-o", f"{url}/merged").code == 2
    assert cli("similar", f"{url}/lib", f"{url}/small").code == 0
    assert cli("diff", f"{url}/lib:sql", f"{url}/adapters/sql").code == 0


def test_names_that_are_no_folder_names_are_listed_at_a_url(at, make_adapter, cli):
    lf.fold({"a/b": make_adapter({"q": (8, 4)}, 2), "c": make_adapter({"q": (8, 4)}, 2)}, at.url)
    assert cli("unfold", at.url, "-o", f"{at.url}-out").code == 0
    names = json.loads(at.fs.cat_file(f"{at.path}-out/names.json"))
    assert list(names.values()) == ["a/b"]


def test_what_stays_on_this_machine_says_so(memory, here, cli):
    for line in (
        ["merge-into", "base", "adapters/sql", "-o", f"{memory.url}/out"],
        ["demo", "-o", f"{memory.url}/out"],
    ):
        done = cli(*line)
        assert done.code == 2
        assert "stays on this machine, give a path" in done.err, done.err
    assert not (here / "memory:").exists()


def test_faults_are_told_in_a_line(memory, here, cli):
    for line in (
        ["info", f"{memory.url}/adapters/sql"],
        ["ls", f"{memory.url}/lib"],
        ["fold", f"{memory.url}/*", "-o", "lib2"],
        ["add", f"{memory.url}/lib", "adapters/sql"],
        ["info", "nowhere://x"],
    ):
        done = cli(*line)
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1, done.err
        assert line[1].partition("*")[0] in done.err or "nowhere://" in done.err
