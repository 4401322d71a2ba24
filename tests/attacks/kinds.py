"""Every kind of file that lorafold reads: how one is made, read, and read by somebody else.

What a reader makes of a file is told in plain values, tensors by their bytes, so that two readers
can be compared with `==`. The other reader is safetensors' own, Python's JSON and CSV, pyyaml, and
arithmetic in a few lines; for what carries a checksum it is whatever was written.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from
from safetensors.torch import save_file
from torch import nn

import lorafold as lf
from lorafold.attach.begin.resumed import Training
from lorafold.cli._bases import tables_of
from lorafold.cli._texts import texts_of
from lorafold.collection.folders import known_names
from lorafold.errors import LorafoldError
from lorafold.files import load_many
from lorafold.files.base import Weights, read_base
from lorafold.fold import Library
from lorafold.merge.recipe import Recipe
from lorafold.roles.role import Role
from lorafold.route import load as load_router
from lorafold.train.job.data import read_data
from lorafold.train.job.dialects import read_config
from lorafold.train.mixin import resume_controller, save_controller
from lorafold.train.steering.pairs import read_pairs
from lorafold.transfer.align.bases import Part
from lorafold.transfer.align.covariances import Moments
from lorafold.transfer.alignment import Alignment, Join

SHAPES = {"model.layers.0.q_proj": (6, 5), "model.layers.1.q_proj": (6, 5)}
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        make: (folder) -> None. files: what is mutated in it.
        load: (folder) -> what lorafold makes of it.
        says: (folder) -> what another reader does; None: what was there before the mutation, or
            as much of it as was found.
        lines, more: command lines that read it, quick ones and others; FOLDER is where it is, OUT
            a free place. imports: what these import late, where it is there.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    load: Callable[[Path], Any]
    says: Callable[[Path], Any] | None = None
    lines: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()


def adapter(seed=0, rank=2, shapes=SHAPES, **told):
    g = torch.Generator().manual_seed(seed)
    modules = {
        p: lf.LowRank(torch.randn(rank, i, generator=g), torch.randn(o, rank, generator=g), 2.0)
        for p, (o, i) in shapes.items()
    }
    return lf.Adapter(modules, base_model="org/base", **told)


def plain(t):
    """A tensor as a value: dtype, shape and bytes."""
    return (
        str(t.dtype),
        tuple(t.shape),
        t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"",
    )


def strict_json(text):
    """Numbers as JSON has them, a key once."""

    def once(pairs):
        if len({k for k, _ in pairs}) < len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def header_of(path):
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return strict_json(data[8 : 8 + n].decode()), tensors_from(data)


def once_prefixed(tensors):
    """PEFT's prefix twice is what a model that was wrapped twice has."""
    found = {}
    for key, t in tensors.items():
        once = re.sub(rf"^({re.escape(PREFIX)})+", PREFIX, key)
        assert once not in found
        found[once] = t
    return found


# Adapters


def make_peft(folder):
    lf.save(adapter(), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {
        "rank_pattern": {"layers.1.q_proj": 2},
        "alpha_pattern": {"layers.1.q_proj": 6},
        "use_rslora": False,
        "lora_alpha": 4,
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "target_modules": ["q_proj"],
        "exclude_modules": None,
        "bias": "none",
        "lora_bias": False,
        "modules_to_save": ["score"],
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "init_lora_weights": True,
        "use_dora": False,
        "fan_in_fan_out": False,
        "trainable_token_indices": None,
        "target_parameters": None,
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = folder / "adapter_model.safetensors"
    extra = {f"{PREFIX}score.weight": torch.arange(6.0).reshape(2, 3)}
    save_file({**tensors_from(file.read_bytes()), **extra}, file, metadata={"format": "pt"})


def told_of(adapter):
    modules = {p: (plain(u.A), plain(u.B), u.scale) for p, u in adapter.items()}
    return {"modules": modules, "extras": {k: plain(t) for k, t in adapter.extras.items()}}


def load_peft(folder):
    return told_of(lf.load(folder))


def peft_says(folder):
    config = strict_json((folder / CONFIG).read_text(encoding="utf-8"))
    return peft_told(config, header_of(folder / WEIGHTS)[1])


def peft_told(config, tensors):
    modules, tensors = {}, once_prefixed(tensors)
    for key in [k for k in tensors if re.search(r"\.lora_A(\.weight)?$", k)]:
        stem = re.sub(r"\.lora_A(\.weight)?$", "", key)
        A = tensors.pop(key)
        B = tensors.pop(key.replace("lora_A", "lora_B"))
        path = stem.removeprefix(PREFIX)
        r, alpha = config["r"], config["lora_alpha"]
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern, value in (config.get(field) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", path):
                    r, alpha = (value, alpha) if field == "rank_pattern" else (r, value)
                    break
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        modules[path] = plain(A), plain(B), scale
    return {"modules": modules, "extras": {k: plain(t) for k, t in tensors.items()}}


def make_mlx(folder):
    shapes = {
        "model.layers.0.self_attn.q_proj": ((5, 2), (2, 6)),
        "model.layers.1.mlp.switch_mlp.up_proj": ((2, 2, 5), (2, 6, 2)),
        "lm_head": ((5, 2), (2, 7)),
    }
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{path}.lora_{side}": torch.randn(shape, generator=g)
        for path, both in shapes.items()
        for side, shape in zip("ab", both, strict=True)
    }
    tensors["lm_head.lora_a"][:, 1] = tensors["lm_head.lora_b"][1] = 0
    ranks = json.dumps({"lm_head": 1})
    save_file(tensors, folder / "adapters.safetensors", metadata={"lorafold_ranks": ranks})
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": list(shapes)},
        "model": "base",
    }
    (folder / CONFIG).write_text(json.dumps(config))


def mlx_says(folder):
    config = strict_json((folder / CONFIG).read_text(encoding="utf-8"))
    header, tensors = header_of(folder / "adapters.safetensors")
    ranks = json.loads((header.get("__metadata__") or {}).get("lorafold_ranks", "{}"))
    scale, modules = float(config["lora_parameters"]["scale"]), {}
    for key in [k for k in tensors if k.endswith(".lora_a")]:
        path = key.removesuffix(".lora_a")
        a, b = tensors.pop(key), tensors.pop(f"{path}.lora_b")
        owner, _, name = path.partition(".switch_mlp.")
        found = {path: (a.T, b.T)}
        if name:
            found = {f"{owner}.experts.{e}.{name}": (a[e], b[e]) for e in range(len(b))}
        for module, (A, B) in found.items():
            r = ranks.get(module, len(A))
            modules[module] = plain(A[:r].contiguous()), plain(B[:, :r].contiguous()), scale
    return {"modules": modules, "extras": {k: plain(t) for k, t in tensors.items()}}


def make_flat(folder):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for p, (o, i) in SHAPES.items():
        tensors[f"A.{p.replace('.', '__')}"] = torch.randn(2, i, generator=g)
        tensors[f"B.{p.replace('.', '__')}"] = torch.randn(o, 2, generator=g)
    told = {"r": "2", "alpha": "4", "kind": "lora", "targets": "q_proj", "layer_range": "0-1"}
    save_file(tensors, folder / "run.safetensors", metadata=told)


def flat_says(folder):
    header, tensors = header_of(folder / "run.safetensors")
    alpha = float(header["__metadata__"]["alpha"])
    modules = {}
    for key in [k for k in tensors if k.startswith("A.")]:
        A, B = tensors.pop(key), tensors.pop("B" + key[1:])
        modules[key[2:].replace("__", ".")] = plain(A), plain(B), alpha / len(A)
    assert not tensors
    return {"modules": modules, "extras": {}}


def make_subspace(folder):
    g = torch.Generator().manual_seed(0)
    shared, meta = {}, {"layer_names": list(SHAPES), "task_ids": ["sql", "law"], "rank": 2}
    for p, (o, i) in SHAPES.items():
        for side, n in (("a", 2 * i), ("b", 2 * o)):
            shared[f"{p}.mean_{side}"] = torch.randn(n, generator=g)
            shared[f"{p}.components_{side}"] = torch.linalg.qr(torch.randn(n, 3, generator=g))[0].T
    save_file({k: t.contiguous() for k, t in shared.items()}, folder / "subspace.safetensors")
    for task in meta["task_ids"]:
        own = {f"{p}.loadings_{s}": torch.randn(3, generator=g) for p in SHAPES for s in "ab"}
        save_file(own, folder / f"task_{task}.safetensors")
    (folder / "subspace_meta.json").write_text(json.dumps(meta))


def load_subspace(folder):
    found = load_many(folder, alpha=4)
    return {n: {p: (plain(u.A), plain(u.B), u.scale) for p, u in found[n].items()} for n in found}


def subspace_says(folder):
    meta = strict_json((folder / "subspace_meta.json").read_text(encoding="utf-8"))
    return subspace_told(folder, meta, header_of(folder / "subspace.safetensors")[1])


def subspace_told(folder, meta, shared):
    found = {}
    for task in meta["task_ids"]:
        name = (meta.get("task_filenames") or {}).get(task, task)
        _, own = header_of(folder / f"task_{name}.safetensors")
        modules = {}
        for p in meta["layer_names"]:
            flat = {}
            for s in "ab":
                sizes = (meta.get(f"shapes_{s}") or {}).get(p)
                size = sizes or ((meta["rank"], -1) if s == "a" else (-1, meta["rank"]))
                mean, load = shared[f"{p}.mean_{s}"].float(), own[f"{p}.loadings_{s}"].float()
                row = mean.flatten() + load @ shared[f"{p}.components_{s}"].float()
                flat[s] = row.reshape(tuple(size))
            modules[p.removeprefix(PREFIX)] = plain(flat["a"]), plain(flat["b"]), 4 / len(flat["a"])
        found[task] = modules
    return found


def make_portable(folder):
    shapes = {
        f"model.layers.{n}.self_attn.{w}": (6, 6) for n in (0, 1) for w in ("q_proj", "v_proj")
    }
    lf.save(adapter(shapes=shapes), folder / "p", format="portable")


def load_portable(folder):
    found = lf.load(folder / "p")
    scales = sorted(u.scale for u in found.values())
    factors = sorted(plain(t) for u in found.values() for t in (u.A, u.B))
    return {"scales": scales, "factors": factors, "names": sorted(found)}


def portable_says(folder):
    header, tensors = header_of(folder / "p" / "portable.safetensors")
    told = json.loads(header["__metadata__"]["modules"])
    factors = sorted(plain(tensors[f"{role}.{x}"]) for role in told for x in "AB")
    names = sorted(said["path"] for said in told.values())
    scales = sorted(float(said["scale"]) for said in told.values())
    return {"scales": scales, "factors": factors, "names": names}


def make_header(folder):
    """What diffusers writes: the config in the header."""
    make_peft(folder)
    config = json.loads((folder / CONFIG).read_text())
    tensors = tensors_from((folder / WEIGHTS).read_bytes())
    told = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, folder / "one.safetensors", metadata=told)
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()


def header_says(folder):
    header, tensors = header_of(folder / "one.safetensors")
    return peft_told(strict_json(header["__metadata__"]["lora_adapter_metadata"]), tensors)


# Libraries, with checksums over every byte


def make_library(folder):
    sources = {n: adapter(k, extras={"head": torch.arange(3.0)}) for k, n in enumerate("abcd")}
    with lf.fold(dict(list(sources.items())[:3]), folder / "lib", tolerance=0.05) as lib:
        lib.add(sources["d"], "d")
    (folder / "sums.json").write_text(json.dumps(sums(folder)))


def sums(folder):
    """{file: its SHA-256}; of what is no file of its size, nothing."""
    paths = {name: folder / name for name in library_files(folder)}
    return {
        name: path.is_file()
        and path.stat().st_size < 1 << 20
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in paths.items()
    }


def load_library(folder):
    """What still comes out of it; that some of it does not is told at once."""
    found = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lib = Library.open(folder / "lib")
    with lib:
        for name in lib.names:
            with contextlib.suppress(LorafoldError):
                found[name] = told_of(lib[name]), lib.error(name)
        damage = lib.verify(strict=False).damage
    assert damage or sums(folder) == json.loads((folder / "sums.json").read_text()), "unseen damage"
    assert set(found) == set("abcd") or damage, "something is lost of a sound library"
    assert set(lib.names) == set("abcd") or told, "what is lost was not warned of"
    return found


def library_files(folder):
    return tuple(sorted(f"lib/{p.name}" for p in (folder / "lib").iterdir() if p.name[0] != "."))


# Bases


def make_base(folder):
    g = torch.Generator().manual_seed(1)
    state = {f"{p}.weight": torch.randn(shape, generator=g) for p, shape in SHAPES.items()}
    state["model.embed_tokens.weight"] = torch.randn(8, 5, generator=g)
    (folder / "base").mkdir()
    save_file(state, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "hidden_size": 5,
        "num_hidden_layers": 2,
        "vocab_size": 8,
        "model_type": "llama",
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    lf.save(adapter(), folder / "a")


def make_shards(folder):
    make_base(folder)
    base = folder / "base"
    state = tensors_from((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").unlink()
    index = {}
    for k, (key, t) in enumerate(state.items()):
        save_file({key: t}, base / f"model-{k}.safetensors", metadata={"format": "pt"})
        index[key] = f"model-{k}.safetensors"
    told = {"metadata": {"total_size": 1}, "weight_map": index}
    (base / "model.safetensors.index.json").write_text(json.dumps(told))


def shards_say(folder):
    base = folder / "base"
    index, found = base / "model.safetensors.index.json", {}
    names = {p.name for p in base.glob("*.safetensors")}
    if os.path.lexists(index):
        told = strict_json(index.read_text(encoding="utf-8"))
        names = set(told["weight_map"].values())
    for name in names:
        found |= header_of(base / name)[1]
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return {"tensors": {k: plain(t) for k, t in found.items()}, "config": repr(config)}


def load_base(folder):
    base = read_base(folder / "base")
    weights = Weights(base)
    told = {k: plain(weights.read(k)) for k in base.entries}
    return {"tensors": told, "config": repr(base.config)}


def base_says(folder):
    _, tensors = header_of(folder / "base" / "model.safetensors")
    config = folder / "base" / "config.json"
    told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return {"tensors": {k: plain(t) for k, t in tensors.items()}, "config": repr(told)}


# What training leaves


class Tree(nn.Module):
    """The layers that the adapters are for."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.model.layers:
            layer.q_proj = nn.Linear(5, 6)


@functools.cache
def attached():
    torch.manual_seed(0)
    model = Tree()
    return model, lf.attach(model, lf.LoRA(2, targets=["q_proj"], init="orthogonal"))


def make_state(folder):
    attached()[1].save(folder / "run", metadata={"step": 3, "best": 0.5})


def load_state(folder):
    found = Training.at(folder / "run" / "training_state.safetensors")
    live = attached()[1]
    live.resume(folder / "run")
    now = {k: plain(t.detach()) for k, t in enumerate(live.parameters())}
    tensors = {p: {k: plain(t) for k, t in ts.items()} for p, ts in found.tensors.items()}
    return {"header": repr(found.header), "tensors": tensors, "now": now}


@functools.cache
def of_rank_4():
    torch.manual_seed(0)
    return lf.attach(Tree(), lf.LoRA(4, targets=["q_proj"], init="orthogonal"))


def controller_of():
    live = of_rank_4()
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    return lf.OrbitalController(live, optimizer, levels=(1, 2, 4), every=1)


def make_controller(folder):
    controller = controller_of()
    for loss in (3.0, 2.5, 2.4, 2.3, 2.25):
        controller.step(loss)
    save_controller(folder, controller)


def load_controller(folder):
    controller = controller_of()
    resume_controller(folder, controller)
    tensors = {k: plain(t) for k, t in controller.tensors().items()}
    return {"state": repr(controller.state_dict()), "tensors": tensors}


# Bases in pairs, routers


def make_alignment(folder):
    g = torch.Generator().manual_seed(0)
    shapes = ((3,), (4,), (3, 3), (3, 4), (4, 4))
    moments = Moments(7, *(torch.randn(shape, generator=g).double() for shape in shapes))
    join = Join(Part("a.q"), Part("b.q"), "x", "x")
    joins = {Role.parse("decoder.0.attention.query"): join}
    digests = ("d" * 64, "e" * 64)
    found = Alignment(joins, {"x": moments}, {}, digests, {"layers": (0, 1)}, 3, 7)
    found.save(folder / "al.safetensors")


def load_alignment(folder):
    found = Alignment.load(folder / "al.safetensors")
    sums = {}
    for part in ("fitted", "held"):
        for name, m in getattr(found, part).items():
            sums[part, name] = (
                m.count,
                {k: plain(v.float()) for k, v in vars(m).items() if k != "count"},
            )
    return {"sums": sums, "texts": found.texts, "tokens": found.tokens, "digests": found.digests}


def alignment_says(folder):
    header, tensors = header_of(folder / "al.safetensors")
    record = json.loads(header["__metadata__"]["lorafold_alignment"])
    sums = {}
    for key, count in record["counts"].items():
        part, _, name = key.partition("/")
        own = {
            k.rpartition("/")[2]: plain(t.float())
            for k, t in tensors.items()
            if k.rpartition("/")[0] == key
        }
        sums[part, name] = count, own
    return {
        "sums": sums,
        "texts": record["texts"],
        "tokens": record["tokens"],
        "digests": tuple(record["digests"]),
    }


ROUTERS = ("centroid", "learned", "arrow")


TEXTS = {"sql": ["select a", "select b", "from c"], "law": ["shall pay", "shall go", "lessee"]}


def make_routers(folder):
    lf.CentroidRouter.fit(TEXTS, "ngrams").save(folder / "centroid")
    torch.manual_seed(0)
    lf.LearnedRouter(("sql", "law"), 8, 4).save(folder / "learned")
    lf.ArrowRouter({"sql": adapter(0), "law": adapter(1)}, top_k=1).save(folder / "arrow")


def load_routers(folder):
    found = {}
    for name in ROUTERS:
        router = load_router(folder / name)
        router.save(folder / "again", overwrite=True)
        found[name] = router_file(folder / "again")
    return found


def router_file(folder):
    record = json.loads((folder / "router.json").read_text(encoding="utf-8"), parse_int=float)
    # What is no field of a router's is left out of what is written again.
    record = {k: v for k, v in record.items() if k not in ("deep", "many", "", "x", "sha256")}
    return {"record": record, "numbers": (folder / "router.safetensors").read_bytes()}


def routers_say(folder):
    return {name: router_file(folder / name) for name in ROUTERS}


# Texts


def make_recipe(folder):
    for k, n in enumerate("ab"):
        lf.save(adapter(k), folder / n)
    (folder / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: org/base\ndtype: float32\nparameters:\n  normalize: true\n"
        "  lambda: 0.5\nmodels:\n- model: a\n  parameters:\n    weight: 0.7\n    density: 0.5\n"
        "- model: b\n  parameters:\n    weight: [0.2, 1.0]\n    density: 0.9\n"
    )


def load_recipe(folder):
    found = Recipe.read(folder / "recipe.yaml")
    models = [(path, values(own)) for path, own in found.models.values()]
    return {
        "method": found.method,
        "base": found.base,
        "models": models,
        "parameters": values(found.parameters),
        "bare": [values(b) for b in found.bare],
    }


def values(found):
    if isinstance(found, dict):
        return {k: values(v) for k, v in found.items()}
    return [values(v) for v in found] if isinstance(found, list | tuple) else found


def recipe_says(folder):
    found = yaml_of(folder / "recipe.yaml")
    base, models, bare = found.get("base_model"), [], []
    for entry in found["models"]:
        own = entry.get("parameters") or {}
        name = entry["model"]
        if name == base:
            bare.append(own)
        else:
            models.append((name.partition("+")[2] or name, own))
    return {
        "method": found["merge_method"],
        "base": base,
        "models": models,
        "parameters": found.get("parameters") or {},
        "bare": bare,
    }


def yaml_of(path):
    """As YAML 1.2 has numbers, a key once."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
                   r"|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN)$"),
        list("-+.0123456789"),
    )  # fmt: skip
    return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)


def make_config(folder):
    (folder / "train.yaml").write_text(
        "rank: 8\nalpha: 16\nlr: 0.001\nsteps: 100\nbatch: 4\nwarmup: 0.1\n"
        "schedule: cosine\nseed: 3\nmax_length: 256\npacking: true\n"
    )


def load_config(folder):
    return as_floats(read_config(str(folder / "train.yaml")).options)


def as_floats(found):
    """Whole numbers as floats: some options are floats, however they are written."""
    return {k: float(v) if type(v) is int else v for k, v in found.items()}


def config_says(folder):
    found = yaml_of(folder / "train.yaml")
    return {k.replace("-", "_"): v for k, v in as_floats(found).items() if v is not None}


def make_data(folder):
    rows = [{"prompt": f"{w} = ", "completion": w.upper()} for w in ("horse", "green", "table")]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "d.csv").write_text('prompt,completion\nhorse,"HO,RSE"\ngreen,"GR\nEEN"\n')
    (folder / "d.json").write_text(json.dumps(rows))
    pairs = [{"prompt": w, "chosen": w.upper(), "rejected": f"{w}!"} for w in ("horse", "green")]
    (folder / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": r["prompt"]}) + "\n" for r in rows))
    (folder / "t.txt").write_text("one\ntwo\nthree\n")


DATA = ("d.jsonl", "d.csv", "d.json")


def load_data(folder):
    found = {name: [dict(r) for r in read_data([str(folder / name)], {}, 1).rows] for name in DATA}
    found["p.jsonl"] = [(p.prompt, p.chosen, p.rejected) for p in read_pairs(folder / "p.jsonl")]
    return found | {n: texts_of(str(folder / n), 1) for n in ("t.jsonl", "t.txt")}


def data_says(folder):
    def text(name):
        return (folder / name).read_bytes().decode("utf-8-sig")

    def rows(name):
        whole = text(name)
        if name.endswith(".csv"):
            cells = [c for c in csv.reader(io.StringIO(whole, newline=""), strict=True) if c]
            return [{k: v for k, v in zip(cells[0], c, strict=True) if v != ""} for c in cells[1:]]
        if whole.lstrip().startswith("["):
            return json.loads(whole)
        return [json.loads(line) for line in whole.split("\n") if line.strip()]

    wanted = ("prompt", "completion")
    found = {n: [{k: r[k] for k in wanted} for r in rows(n)] for n in DATA}
    found["p.jsonl"] = [(r["prompt"], r["chosen"], r["rejected"]) for r in rows("p.jsonl")]
    found["t.jsonl"] = [r["text"] for r in rows("t.jsonl")]
    lines = (folder / "t.txt").read_bytes().decode().split("\n")
    found["t.txt"] = [s for line in lines if (s := line.removesuffix("\r").strip())]
    return found


def make_tables(folder):
    (folder / "table.json").write_text(
        json.dumps({"wq": "attention.query", "wv": "attention.value"})
    )
    lf.save(adapter(shapes={"layers.0.wq": (4, 4)}), folder / "a")


def load_tables(folder):
    return tables_of([str(folder / "table.json")])


def tables_say(folder):
    return [strict_json((folder / "table.json").read_text(encoding="utf-8"))]


def make_names(folder):
    with lf.fold({"a/b": adapter(0), "c d": adapter(1)}) as lib:
        lib.save(folder / "lib")
    from click.testing import CliRunner

    from lorafold.cli import main

    CliRunner().invoke(main, ["unfold", str(folder / "lib"), "-o", str(folder / "out")])
    assert (folder / "out" / "names.json").is_file()


def load_names(folder):
    return known_names(folder / "out")


def names_say(folder):
    path = folder / "out" / "names.json"
    return strict_json(path.read_text(encoding="utf-8")) if path.is_file() else {}


KINDS = {
    "peft": Kind(
        make_peft,
        (WEIGHTS, CONFIG),
        load_peft,
        peft_says,
        ("info FOLDER", "resize FOLDER OUT --rank 1", "fold FOLDER -o OUT", "anatomy FOLDER"),
    ),
    "mlx": Kind(
        make_mlx,
        ("adapters.safetensors", CONFIG),
        load_peft,
        mlx_says,
        ("info FOLDER", "convert FOLDER -o OUT --to peft", "fold FOLDER -o OUT"),
    ),
    "header": Kind(
        make_header,
        ("one.safetensors",),
        lambda f: told_of(lf.load(f / "one.safetensors")),
        header_says,
        ("info FOLDER/one.safetensors",),
    ),
    "flat": Kind(
        make_flat,
        ("run.safetensors",),
        lambda f: told_of(lf.load(f / "run.safetensors")),
        flat_says,
        ("info FOLDER/run.safetensors",),
    ),
    "vlora": Kind(
        make_subspace,
        ("subspace_meta.json", "subspace.safetensors", "task_sql.safetensors"),
        load_subspace,
        subspace_says,
        (
            "info FOLDER",
            "verify FOLDER",
            "diff FOLDER:sql FOLDER:law --alpha 4",
            "fold FOLDER -o OUT --alpha 4",
        ),
    ),
    "portable": Kind(
        make_portable, ("p/portable.safetensors",), load_portable, portable_says, ("info FOLDER/p",)
    ),
    "library": Kind(
        make_library,
        ("lib/library.json",),
        load_library,
        None,
        (
            "ls FOLDER/lib",
            "info FOLDER/lib",
            "verify FOLDER/lib",
            "unfold FOLDER/lib -o OUT",
            "rm FOLDER/lib a",
            "repair FOLDER/lib",
            "diff FOLDER/lib:a FOLDER/lib:b",
        ),
    ),
    "base": Kind(
        make_base,
        ("base/model.safetensors", "base/config.json"),
        load_base,
        base_says,
        (
            "check FOLDER/a --base FOLDER/base",
            "merge-into FOLDER/base FOLDER/a -o OUT",
            "extract FOLDER/base FOLDER/base -o OUT --rank 1",
        ),
        ("roles FOLDER/base",),
    ),
    "shards": Kind(
        make_shards,
        ("base/model-0.safetensors", "base/model.safetensors.index.json"),
        load_base,
        shards_say,
        ("merge-into FOLDER/base FOLDER/a -o OUT",),
    ),
    "state": Kind(
        make_state, ("run/training_state.safetensors",), load_state, None, ("info FOLDER/run",)
    ),
    "controller": Kind(make_controller, ("controller_state.safetensors",), load_controller),
    "alignment": Kind(make_alignment, ("al.safetensors",), load_alignment, alignment_says),
    "router": Kind(
        make_routers,
        tuple(f"{name}/router.{end}" for name in ROUTERS for end in ("json", "safetensors")),
        load_routers,
        routers_say,
        (),
        ("route ask FOLDER/centroid x", "route ask FOLDER/learned x"),
        imports=("sentence_transformers",),
    ),
    "recipe": Kind(
        make_recipe,
        ("recipe.yaml",),
        load_recipe,
        recipe_says,
        ("merge FOLDER/recipe.yaml -o OUT",),
    ),
    "config": Kind(make_config, ("train.yaml",), load_config, config_says),
    "data": Kind(
        make_data,
        (*DATA, "p.jsonl", "t.jsonl", "t.txt"),
        load_data,
        data_says,
        ("route fit FOLDER/t.txt FOLDER/t.jsonl -o OUT",),
    ),
    "table": Kind(
        make_tables,
        ("table.json",),
        load_tables,
        tables_say,
        ("roles FOLDER/a --table FOLDER/table.json",),
    ),
    "names": Kind(
        make_names,
        ("out/names.json",),
        load_names,
        names_say,
        ("unfold FOLDER/lib -o FOLDER/out --overwrite",),
    ),
}
