"""The plugin against vLLM's classes: what is asked for is there, and nothing else is written."""

import asyncio
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.serve.engines import vllm as plugin
from lorafold.serve.engines.settings import Settings
from lorafold.serve.engines.unfolding import Unfolded

BASE = "org/base"
SOURCE = str(Path(lf.__file__).parents[1])


def resolve(resolver, *names):
    """What each name gives, all of them asked for at once."""

    async def ask():
        return await asyncio.gather(*(resolver.resolve_lora(BASE, name) for name in names))

    return asyncio.run(ask())


def folders(settings):
    if not settings.folder.exists():
        return []
    return sorted(p for p in settings.folder.iterdir() if not p.name.startswith("."))


def dense(folder):
    """{module: ΔW} as a reader of one rank and α has it, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            assert A.shape[0] == config["r"]
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = config["lora_alpha"] / config["r"] * B.double() @ A.double()
    assert len(tensors) == 2 * len(found)
    return found


def weights(adapter):
    return {path: u.scale * u.B.double() @ u.A.double() for path, u in adapter.modules.items()}


def best(W, rank):
    """Eckart–Young, densely."""
    U, S, Vh = torch.linalg.svd(W)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, W in expected.items():
        assert torch.allclose(found[path], W, atol=1e-5 * max(1, W.abs().max())), path


# What is asked for


def test_every_name_of_a_library_is_served(vllm, settings):
    library = lf.Library.open(settings.library)
    found = resolve(plugin.resolver(settings), *library.names)
    for name, request in zip(library.names, found, strict=True):
        assert (request.lora_name, request.lora_int_id >= 1) == (name, True)
        assert_equal(dense(Path(request.lora_path)), weights(library[name]))
    assert len(folders(settings)) == len(library.names)


def test_strengths_ranks_and_mixes(vllm, settings):
    library = lf.Library.open(settings.library)
    sql, polite = weights(library["sql"]), weights(library["polite"])
    expected = {
        "sql@c=0.5": {p: W / 2 for p, W in sql.items()},
        "sql@c=-1.25": {p: -1.25 * W for p, W in sql.items()},
        "sql@c=0": {p: 0 * W for p, W in sql.items()},
        "sql@r=2": {p: best(W, 2) for p, W in sql.items()},
        "sql@r=99": sql,
        "sql@r=1@c=2": {p: 2 * best(W, 1) for p, W in sql.items()},
        "sql:0.7+polite:-0.3": {p: 0.7 * W - 0.3 * polite[p] for p, W in sql.items()},
        "sql+polite@r=1@c=2": {p: 2 * (best(W, 1) + best(polite[p], 1)) for p, W in sql.items()},
    }
    found = resolve(plugin.resolver(settings), *expected)
    for request, (name, updates) in zip(found, expected.items(), strict=True):
        assert request.lora_name == name
        assert_equal(dense(Path(request.lora_path)), updates)


def test_the_config_is_one_that_vllm_takes(vllm, settings):
    for request in resolve(plugin.resolver(settings), "sql", "polite@c=2"):
        config = json.loads((Path(request.lora_path) / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True
        assert config["base_model_name_or_path"] == BASE
        assert config["peft_type"] == "LORA"
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert not any(config[key] for key in ("use_dora", "use_rslora", "modules_to_save"))


def test_numbers_are_rounded_to_two_places(vllm, settings):
    near = "sql@c=0.5", "sql@c=0.501", "sql@c=.50", "sql@c=+0.4999"
    assert len({request.lora_path for request in resolve(plugin.resolver(settings), *near)}) == 1
    zero = resolve(plugin.resolver(settings), "sql@c=-0.001", "sql@c=0")
    assert zero[0].lora_path == zero[1].lora_path


def test_a_dtype_can_be_asked_for(vllm, settings):
    full, half = settings, replace(settings, dtype="bfloat16")
    a, b = (resolve(plugin.resolver(s), "sql")[0].lora_path for s in (full, half))
    assert a != b
    tensors = load_file(Path(b) / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    exact = dense(Path(a))
    for path, W in dense(Path(b)).items():
        assert (W - exact[path]).norm() < 2**-7 * exact[path].norm()


# What is not


NOTHING = [
    *("nope", "", "..", ".", "/", "../../etc/passwd", "/etc/passwd", "sql/../sql", "a\0b", "sql\0"),
    *("x" * 5_000, "sql" * 5_000, "sql@c=x", "sql@c=nan", "sql@c=inf", "sql@c=1e999", "sql@r=0"),
    *("sql@r=-1", "sql@r=1.5", "sql@q=1", "sql@c=1@c=2", "sql+nope", "sql+sql", "sql:nan", "sql@"),
    *("sql@c=10000", "+", "@c=1", "\ud800", "sql\n", "SQL", "lora-" + "0" * 32),
]


def test_unknown_names_give_none_and_write_nothing(vllm, settings, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert resolve(plugin.resolver(settings), *NOTHING) == [None] * len(NOTHING)
    assert sorted(tmp_path.rglob("*")) == before


def test_whatever_goes_wrong_is_logged_and_none(vllm, settings, caplog, monkeypatch):
    def breaks(*_, **__):
        raise MemoryError("no more")

    monkeypatch.setattr("lorafold.serve.engines.unfolding.peft_form", breaks)
    assert resolve(plugin.resolver(settings), "sql") == [None]
    assert "no adapter 'sql'" in caplog.text
    assert "no more" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(vllm, settings, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    broken = replace(settings, folder=tmp_path / "file" / "cache")
    assert resolve(plugin.resolver(broken), "sql") == [None]
    assert "LORAFOLD_VLLM_CACHE names another folder" in caplog.text


def test_a_missing_library_is_named_and_may_come_later(vllm, settings, caplog, library, tmp_path):
    later = replace(settings, library=str(tmp_path / "later"))
    resolver = plugin.resolver(later)
    assert resolve(resolver, "sql") == [None]
    assert str(tmp_path / "later") in caplog.text
    library.rename(tmp_path / "later")
    assert resolve(resolver, "sql")[0].lora_name == "sql"


def test_what_algebra_is_refused_for_is_served_as_it_is_or_refused(vllm, tmp_path, caplog):
    config = {"use_dora": True, "r": 4, "lora_alpha": 4, "peft_type": "LORA"}
    u = lf.LowRank(torch.ones(4, 8), torch.ones(8, 4))
    magnitude = {"base_model.model.q_proj.lora_magnitude_vector": torch.ones(8)}
    dora = lf.Adapter({"q_proj": u}, magnitude, config)
    lf.fold({"dora": dora}, tmp_path / "lib", tolerance=0.1).close()
    resolver = plugin.resolver(Settings(str(tmp_path / "lib"), tmp_path / "cache"))
    plain, scaled = resolve(resolver, "dora", "dora@c=0.5")
    assert scaled is None
    assert "DoRA" in caplog.text
    loaded = lf.load(plain.lora_path)
    assert loaded.config["use_dora"] is True  # vLLM says that it has no DoRA
    assert torch.equal(loaded.extras[next(iter(magnitude))], torch.ones(8))


# Many


def test_many_at_once(vllm, settings):
    resolver = plugin.resolver(replace(settings, variants=100))
    names = [f"sql@c={i / 50}" for i in range(93)]
    found = resolve(resolver, *names, *["polite@c=0.5"] * 50)
    assert len({request.lora_path for request in found}) == len(folders(settings)) == 94
    before = {p: p.stat().st_ino for p in settings.folder.rglob("adapter_*")}
    assert [r.lora_path for r in resolve(resolver, *names)] == [r.lora_path for r in found[:93]]
    assert {p: p.stat().st_ino for p in settings.folder.rglob("adapter_*")} == before


def test_variants_of_a_name_are_bounded(vllm, settings, caplog):
    resolver = plugin.resolver(replace(settings, variants=3))
    first = ["sql@c=1.5", "sql@c=1.50", "sql@r=1"]  # each takes a place in vLLM, however alike
    assert None not in resolve(resolver, *first)
    assert resolve(resolver, "sql@c=3", "sql+polite") == [None, None]
    assert "'sql' has 3 variants" in caplog.text
    assert "LORAFOLD_VLLM_VARIANTS=6" in caplog.text
    assert None not in resolve(resolver, *first, "sql", "polite@c=3")


def test_bytes_are_bounded(vllm, settings, caplog):
    one = resolve(plugin.resolver(settings), "sql")[0]
    size = sum(p.stat().st_size for p in Path(one.lora_path).iterdir())
    resolver = plugin.resolver(replace(settings, nbytes=3 * size - size // 2))
    found = resolve(resolver, "sql", "sql@c=0.5", "sql@c=0.6", "sql@c=0.5")
    assert [request is None for request in found] == [False, False, True, False]
    assert "LORAFOLD_VLLM_BYTES sets another" in caplog.text
    assert len(folders(settings)) == 2


def test_the_longest_unused_go_when_a_process_begins_alone(vllm, settings):
    first = Unfolded(settings)
    paths = [first.folder(f"sql@c={i}", BASE) for i in range(2, 6)]
    for age, path in enumerate([paths[1], paths[0], paths[3], paths[2]]):
        os.utime(path, (1_000 + age, 1_000 + age))
    (settings.folder / "mine").mkdir()
    size = sum(p.stat().st_size for p in paths[0].iterdir())
    tight = replace(settings, nbytes=5 * size)
    second = Unfolded(tight)
    second.folder("sql@c=2", BASE)
    second.close()
    assert set(folders(settings)) == {*paths, settings.folder / "mine"}  # the first still runs
    first.close()
    last = Unfolded(tight)
    last.folder("sql@c=2", BASE)
    last.close()
    assert set(folders(settings)) == {paths[0], paths[2], settings.folder / "mine"}


def test_a_folder_of_which_a_file_was_swept_away_is_written_again(vllm, settings):
    resolver = plugin.resolver(settings)
    path = Path(resolve(resolver, "sql")[0].lora_path)
    before = dense(path)
    (path / "adapter_config.json").unlink()
    assert Path(resolve(resolver, "sql")[0].lora_path) == path
    assert_equal(dense(path), before)


# A library that changes


def test_changes_of_the_library_are_seen(vllm, settings):
    resolver = plugin.resolver(settings)
    old = resolve(resolver, "sql", "new")
    assert old[1] is None
    with lf.Library.open(settings.library) as library:
        polite = library["polite"]
        library.add(polite, "new")
        library.add(polite, "sql", replace=True)
        now = {name: weights(library[name]) for name in ("sql", "new")}
    new = resolve(resolver, "sql", "new")
    assert new[0].lora_path != old[0].lora_path
    for request in new:
        assert_equal(dense(Path(request.lora_path)), now[request.lora_name])


def test_a_refold_gives_other_folders(vllm, settings):
    """The library keeps the original's digest, and its numbers change."""
    resolver = plugin.resolver(settings)
    before = resolve(resolver, "sql")[0].lora_path
    with lf.Library.open(settings.library) as library:
        digest = library.entry("sql")["digest"]
        library.refold(tolerance=0.3)
        assert library.entry("sql")["digest"] == digest
        expected = weights(library["sql"])
    after = resolve(resolver, "sql")[0].lora_path
    assert after != before
    assert_equal(dense(Path(after)), expected)


def test_a_library_at_a_url(vllm, library, memory, tmp_path, monkeypatch):
    with lf.Library.open(library) as opened:
        opened.save(memory.url).close()
    resolver = plugin.resolver(Settings(memory.url, tmp_path / "cache"))
    request, later = resolve(resolver, "sql@c=0.5", "new")
    assert later is None
    with lf.Library.open(memory.url) as there:
        assert_equal(dense(Path(request.lora_path)), weights(0.5 * there["sql"]))
        there.add(there["polite"], "new")
    assert resolve(resolver, "new") == [None]  # it is looked at once a minute
    monkeypatch.setattr("lorafold.serve.engines.unfolding._FRESH", 1e-6)
    assert resolve(resolver, "new")[0].lora_name == "new"


# Several processes


def child(code, *arguments):
    """A Python that finds this lorafold and runs the code."""
    setup = f"""
        import sys, os, signal
        sys.path.insert(0, {SOURCE!r})
        from lorafold.serve.engines.settings import Settings
        from lorafold.serve.engines.unfolding import Unfolded
        from pathlib import Path
        settings = Settings(sys.argv[1], Path(sys.argv[2]))
    """
    code = textwrap.dedent(setup) + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_one_folder(settings):
    code = """
        adapters = Unfolded(settings)
        for i in range(8):
            print(adapters.folder(f"sql@c={i / 4}", "org/base"))
    """
    both = [child(code, settings.library, settings.folder) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert told[0][0].split() != []
    assert {str(p) for p in folders(settings)} == set(told[0][0].split())


@pytest.mark.skipif(sys.platform == "win32", reason="vLLM runs on POSIX systems")
def test_a_killed_unfold_leaves_nothing_half(vllm, settings):
    code = """
        import lorafold.serve.engines.unfolding as module
        def killed(folder, tensors, config):
            (folder / "adapter_model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        module.write_form = killed
        Unfolded(settings).folder("sql", "org/base")
    """
    process = child(code, settings.library, settings.folder)
    process.communicate()
    assert process.returncode == -9
    assert folders(settings) == []
    assert len(list(settings.folder.iterdir())) == 2  # the lock, and what was being written
    request = resolve(plugin.resolver(settings), "sql")[0]
    assert sorted(p.name for p in settings.folder.iterdir()) == [
        ".lock",
        Path(request.lora_path).name,
    ]


# Registering


def test_registering_by_the_environment(vllm, settings, monkeypatch, caplog):
    monkeypatch.delenv("LORAFOLD_LIBRARY", raising=False)
    plugin.register()
    assert not vllm.resolvers
    monkeypatch.setenv("LORAFOLD_LIBRARY", settings.library)
    monkeypatch.setenv("LORAFOLD_VLLM_CACHE", str(settings.folder))
    monkeypatch.setenv("LORAFOLD_VLLM_DTYPE", "bfloat16")
    plugin.register()
    plugin.register()  # every process of vLLM's does, some of them twice
    assert "already registered" not in caplog.text
    assert "only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caplog.text
    found = resolve(vllm.get_resolver("lorafold"), "sql@r=2")[0]
    assert Path(found.lora_path).parent == settings.folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LORAFOLD_VLLM_DTYPE", "int4"),
        ("LORAFOLD_VLLM_BYTES", "much"),
        ("LORAFOLD_VLLM_BYTES", "-1"),
        ("LORAFOLD_VLLM_VARIANTS", "many"),
        ("LORAFOLD_VLLM_VARIANTS", "-1"),
    ],
)
def test_a_wrong_environment_is_logged(vllm, settings, monkeypatch, caplog, name, value):
    monkeypatch.setenv("LORAFOLD_LIBRARY", settings.library)
    monkeypatch.setenv(name, value)
    plugin.register()
    assert not vllm.resolvers
    assert f"{name} must be" in caplog.text


def test_settings_of_the_environment(tmp_path):
    assert Settings.of({}) is None
    plain = Settings.of({"LORAFOLD_LIBRARY": "lib", "XDG_CACHE_HOME": str(tmp_path)})
    assert plain == Settings("lib", tmp_path / "lorafold" / "vllm")
    every = {
        "LORAFOLD_LIBRARY": "s3://bucket/lib",
        "LORAFOLD_VLLM_CACHE": str(tmp_path),
        "LORAFOLD_VLLM_DTYPE": "bfloat16",
        "LORAFOLD_VLLM_BYTES": "2GiB",
        "LORAFOLD_VLLM_VARIANTS": "0",
    }
    assert Settings.of(every) == Settings("s3://bucket/lib", tmp_path, "bfloat16", 2 << 30, 0)


def test_without_vllm_it_says_so(settings, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(lf.errors.MissingExtraError, match="pip install vllm"):
        plugin.resolver(settings)
    monkeypatch.setenv("LORAFOLD_LIBRARY", settings.library)
    with caplog.at_level(logging.ERROR):
        plugin.register()
    assert "has no resolvers" in caplog.text


def test_registering_imports_no_torch(library):
    code = """
        import types
        for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
            sys.modules[name] = types.ModuleType(name)
        class Registry:
            get_supported_resolvers = staticmethod(set)
            register_resolver = staticmethod(lambda name, resolver: print("registered", name))
        sys.modules["vllm.lora.resolver"].LoRAResolver = object
        sys.modules["vllm.lora.resolver"].LoRAResolverRegistry = Registry
        sys.modules["vllm.lora.request"].LoRARequest = object
        os.environ["LORAFOLD_LIBRARY"] = sys.argv[1]
        from lorafold.serve.engines.vllm import register
        register()
        print({"torch", "numpy", "safetensors"} & set(sys.modules))
    """
    code = textwrap.dedent(code)
    start = f"import sys, os; sys.path.insert(0, {SOURCE!r})\n"
    command = [sys.executable, "-c", start + code, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "registered lorafold\nset()\n", done.stderr


def test_vllm_finds_it_by_its_entry_point():
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="lorafold")
    if not found:
        pytest.skip("lorafold is installed here as it was before it had the plugin")
    assert {entry.load() for entry in found} == {plugin.register}


def test_the_entry_point_is_written_down():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert section.startswith('lorafold = "lorafold.serve.engines.vllm:register"')


def test_the_classes_of_these_tests_are_like_those_of_vllm():
    request = pytest.importorskip("vllm.lora.request").LoRARequest
    resolver = pytest.importorskip("vllm.lora.resolver")
    made = request(lora_name="a", lora_int_id=1, lora_path="b")
    assert (made.lora_name, made.lora_path) == ("a", "b")
    assert set(resolver.LoRAResolver.__abstractmethods__) == {"resolve_lora"}
