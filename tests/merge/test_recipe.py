"""mergekit's recipes on adapters, against its rules on dense weights of whole models."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.merge import Recipe
from lorafold.merge.algebra.core import Members

pytest.importorskip("yaml")

LAYERS = 5
SHAPES = {f"model.layers.{n}.{m}": (12, 20) for n in range(LAYERS) for m in ("attn.q", "mlp.up")}


@pytest.fixture(scope="module")
def models(make_adapter, tmp_path_factory):
    """A folder with the adapters sql, law and art, and the adapters."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for seed, (name, rank) in enumerate({"sql": 2, "law": 4, "art": 3}.items()):
        found[name] = make_adapter(SHAPES, rank, seed=seed, base_model="org/base")
        lf.save(found[name], folder / name)
    return folder, found


@pytest.fixture
def recipe(models, tmp_path):
    """recipe(text with {sql}, {law}, {art} for paths) -> the path of its file."""

    def written(text, name="recipe.yaml"):
        paths = {n: models[0] / n for n in models[1]}
        (tmp_path / name).write_text(text.format(**paths) if paths else text)
        return tmp_path / name

    return written


@pytest.fixture
def uniforms(monkeypatch):
    """Random numbers that both sides can have: {(name, path): array}."""
    drawn = {}

    def draw(self, i, shape, side=""):
        rng = np.random.default_rng([i, *self.path.encode()])
        drawn[self.names[i], self.path] = rng.random(tuple(shape))
        return torch.from_numpy(drawn[self.names[i], self.path])

    monkeypatch.setattr(Members, "uniforms", draw)
    return drawn


# mergekit, as its documentation and source have it, on whole weights


def sparsified(x, kind, density, *, gamma=0.01, epsilon=0.15, u=None, rescale=False):
    if kind is None or density >= 1:
        return x
    n, mask = x.size, np.zeros(x.shape)
    order = np.argsort(np.abs(x), axis=None)
    if kind == "magnitude":
        mask.flat[order[n - int(density * n) :]] = 1
    elif kind == "outliers":
        target, top = int(density * n), int(gamma * n)
        mask.flat[order[n - target - top : n - top]] = 1
    elif kind == "random":
        mask[u < density] = 1
    else:
        ranks = np.argsort(np.argsort(np.abs(x), axis=1), axis=1) / (x.shape[1] - 1)
        mask[u < density - epsilon + 2 * epsilon * ranks] = 1
    kept = x * mask
    return kept * np.abs(x).sum() / np.abs(kept).sum() if rescale else kept


def generalised(W, deltas, weights, *, consensus, normalize, lambda_=1.0):
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    total = sum(weighted)
    if consensus:
        majority = np.where(total >= 0, 1, -1)
        masks = [np.sign(x) == majority for x in weighted]
        total = sum(x * m for x, m in zip(weighted, masks, strict=True))
        divisor = sum(w * m for w, m in zip(weights, masks, strict=True))
    else:
        divisor = np.full(W.shape, sum(weights))
    divisor = np.where(np.abs(divisor) < 1e-8, 1, divisor)
    return W + lambda_ * (total / divisor if normalize else total)


METHODS = {
    # sparsification, consensus, normalize, rescale
    "task_arithmetic": (None, False, False, False),
    "ties": ("magnitude", True, True, False),
    "dare_ties": ("random", True, False, True),
    "dare_linear": ("random", False, False, True),
    "breadcrumbs": ("outliers", False, False, False),
    "breadcrumbs_ties": ("outliers", True, False, False),
    "della": ("magprune", True, True, True),
    "della_linear": ("magprune", False, False, True),
}


@pytest.mark.filterwarnings("ignore:.*takes no notice of 'density'")
@pytest.mark.parametrize("given", ["", "normalize: true", "normalize: false, lambda: 0.5"])
@pytest.mark.parametrize("weights", [(0.5, 0.3, 1.0), (1.0, -0.4, 0.6)])
@pytest.mark.parametrize("method", METHODS)
def test_the_base_with_the_result_is_mergekit_s(
    models, recipe, uniforms, dense, method, weights, given
):
    kind, consensus, normalize, rescale = METHODS[method]
    path = recipe(
        f"""
merge_method: {method}
base_model: org/base
models:
  - model: {{sql}}
    parameters: {{{{weight: {weights[0]}, density: 0.5}}}}
  - model: org/base+{{law}}
    parameters: {{{{weight: {weights[1]}, density: 0.3}}}}
  - model: {{art}}
    parameters: {{{{weight: {weights[2]}, density: 0.6}}}}
parameters: {{{{{given}}}}}
"""
    )
    merged = Recipe.read(path).merge(rank=12)
    normalize = "normalize: true" in given if "normalize" in given else normalize
    for p in SHAPES:
        W = np.random.default_rng(0).standard_normal((12, 20))
        deltas = [
            sparsified(dense(a[p]).numpy(), kind, d, u=uniforms.get((n, p)), rescale=rescale)
            for (n, a), d in zip(models[1].items(), (0.5, 0.3, 0.6), strict=True)
        ]
        lambda_ = 0.5 if "lambda" in given else 1.0
        wanted = generalised(
            W, deltas, weights, consensus=consensus, normalize=normalize, lambda_=lambda_
        )
        assert np.abs(W + dense(merged[p]).numpy() - wanted).max() < 1e-4


def test_linear_is_a_mean_in_which_the_base_counts(models, recipe, dense):
    text = """
merge_method: linear
models:
  - {{model: {sql}, parameters: {{weight: 1.0}}}}
  - {{model: {law}, parameters: {{weight: 0.5}}}}
  - {{model: org/base, parameters: {{weight: 0.5}}}}
base_model: org/base
dtype: bfloat16
"""
    found = Recipe.read(recipe(text))
    assert found.dtype == "bfloat16"
    merged = found.merge()
    sql, law, _ = models[1].values()
    assert merged.distance(0.5 * sql + 0.25 * law) < 1e-5
    plain = text.replace("dtype: bfloat16", "parameters: {{normalize: false}}")
    with pytest.raises(lf.MismatchError, match="add up to 1"):
        Recipe.read(recipe(plain)).merge()
    plain = plain.replace("weight: 1.0", "weight: 0.25").replace("weight: 0.5", "weight: 0.375")
    assert Recipe.read(recipe(plain)).merge().distance(0.25 * sql + 0.375 * law) < 1e-5


def test_gradients_and_filters_go_by_layer_and_name(models, recipe, tmp_path, off_by):
    text = """
merge_method: task_arithmetic
base_model: BASE
models:
  - model: {sql}
    parameters:
      weight: [0.0, 1.0, 0.0]
  - model: {law}
    parameters:
      weight:
        - {{filter: mlp, value: [1.0, 2.0]}}
        - {{value: -0.5}}
"""
    sql, law, _ = models[1].values()

    def check(base, depth):
        merged = Recipe.read(recipe(text.replace("BASE", base))).merge()
        for n in range(LAYERS):
            t = n / (depth - 1)
            a = 2 * t if t <= 0.5 else 2 - 2 * t
            for m, b in (("attn.q", -0.5), ("mlp.up", 1 + t)):
                p = f"model.layers.{n}.{m}"
                off_by(merged[p], a * sql[p], b * law[p])

    check("org/base", LAYERS)
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 9}))
    check(str(folder), 9)


@pytest.fixture
def off_by(dense):
    def check(u, *parts):
        wanted = sum(dense(p) for p in parts)
        assert torch.linalg.norm(dense(u) - wanted) < 1e-5 * (1 + torch.linalg.norm(wanted))

    return check


def test_it_says_what_it_was_asked_for(models, recipe):
    path = recipe(
        "merge_method: ties\nmodels: [{{model: {sql}, parameters: {{weight: [0, 1]}}}},"
        " {{model: {law}, parameters: {{weight: 1}}}}]\nparameters: {{density: 0.4}}\n"
    )
    merged = Recipe.read(path).merge()
    facts = json.loads(merged.config["lorafold_origin"]["metadata"]["lorafold_merge"])
    assert facts["method"] == "ties (mergekit recipe)"
    assert facts["options"]["density"] == 0.4
    assert facts["sources"][1] == {
        "name": "law",
        "weight": 1.0,
        "digest": lf.load(models[0] / "law").digest,
    }
    assert facts["error"] >= 0


ONE = "models: [{{model: {sql}, parameters: {{weight: 1}}}}]\n"
BARE = "models: [{{model: {sql}}}]\n"
BOMB = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in ("ab", "bc", "cd"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("merge_method: ties\nmodels: [\n  - x: {{\n", "line 3"),
        ("a: b: c\n", "line 1"),
        ("merge_method: ties\n\nfoo: 1\n" + ONE, "line 3: 'foo'"),
        (ONE + "merge_method: ties\nparameters:\n  foo: 1\n", "line 4: parameter 'foo'"),
        ("merge_method: ties\n" + ONE + ONE, "line 3: 'models' is there twice"),
        (
            "merge_method: ties\nmodels:\n- model: {sql}\n"
            "  parameters:\n    weight: 1\n    weight: 2\n",
            "line 6: 'weight' is there twice",
        ),
        ("merge_method: t\0es\n" + ONE, "line 1: unacceptable"),
        ("merge_method: [ties]\n" + ONE, "merge_method must be a name"),
        ("merge_method: ties\ndtype: [bfloat16]\n" + ONE, "line 2: dtype"),
        ("merge_method: ties\ndtype: int8\nout_dtype: bfloat16\n" + ONE, "line 2: dtype"),
        ("merge_method: ties\nmodels: &m\n- *m\n", "line 2: .*recursive"),
        ("merge_method: ties\nparameters: {{weight: &w {{value: *w}}}}\n" + ONE, "recursive"),
        ("models: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + BOMB, "line 1: .*more than 10,000"),
        ("merge_method: ties\nparameters: {{weight: 1" + "0" * 400 + "}}\n" + BARE, "number"),
        (
            "merge_method: ties\nparameters: {{weight: [1, true]}}\n" + BARE,
            "line 2: .*number, found True",
        ),
        (
            "merge_method: ties\nparameters: {{weight: [{{filter: 3, value: 1}}]}}\n" + BARE,
            "filter must be a part of a name",
        ),
        ("merge_method: ties\nparameters: {{int8_mask: maybe}}\n" + ONE, "int8_mask"),
        ("merge_method: ties\nparameters: {{normalize: 2}}\n" + ONE, "normalize"),
        ("merge_method: breadcrumbs\nparameters: {{gamma: 5}}\n" + ONE, "line 2: 'gamma' must lie"),
        ("merge_method: della\nparameters: {{epsilon: -1}}\n" + ONE, "line 2: 'epsilon' must lie"),
        ("merge_method: ties\nmodels: [{{model: ./no, parameters: {{weight: 1}}}}]\n", "no such"),
        ("- 1\n", "no merge_method"),
        ("models: []\n", "no merge_method"),
        ("merge_method: slerp\n" + ONE, "'slerp' acts on whole weights"),
        ("merge_method: model_stock\n" + ONE, "acts on whole weights"),
        ("merge_method: tise\n" + ONE, "did you mean 'ties'"),
        ("merge_method: ties\nslices: []\n", "'slices' can't be honoured .* use models:"),
        ("merge_method: ties\ntokenizer_source: union\n" + ONE, "'tokenizer_source'"),
        ("merge_method: ties\nmodels: 3\n", "list"),
        ("merge_method: ties\nmodels: [3]\n", "entry of models"),
        ("merge_method: ties\nmodels: [{{model: {sql}, weight: 1}}]\n", "entry of models"),
        ("merge_method: ties\ndtype: int8\n" + ONE, "dtype"),
        ("merge_method: ties\nbase_model: {{model: x}}\n" + ONE, "base_model"),
        ("merge_method: ties\nparameters: {{t: 0.5}}\n" + ONE, "parameter 't'"),
        ("merge_method: ties\nparameters: 3\n" + ONE, "parameters"),
        ("merge_method: ties\nmodels: [{{model: {sql}}}]\n", "'weight' is missing"),
        ("merge_method: ties\nmodels: [{{model: {sql}, parameters: {{weight: x}}}}]\n", "number"),
        ("merge_method: ties\nparameters: {{density: 2}}\n" + ONE, r"\(0, 1\]"),
        ("merge_method: ties\nparameters: {{normalize: [0, 1]}}\n" + ONE, "normalize"),
        ("merge_method: ties\nparameters: {{lambda: [0, 1]}}\n" + ONE, "'lambda'"),
        ("merge_method: della\nparameters: {{density: 0.9}}\n" + ONE, "epsilon"),
        ("merge_method: ties\nbase_model: other/name\n" + ONE, "base_model is 'other/name'"),
        (
            "merge_method: ties\nbase_model: x/y\nmodels: [{{model: 'a/b+c', parameters: {{}}}}]\n",
            "another base",
        ),
        ("merge_method: ties\nbase_model: x\nmodels: [{{model: x}}]\n", "only the base"),
        (
            "merge_method: ties\nmodels: [{{model: {sql}, parameters: {{weight: 1}}}},"
            " {{model: {sql}, parameters: {{weight: 1}}}}]\n",
            "twice",
        ),
        (
            "merge_method: ties\nmodels:\n- model: {sql}\n  parameters:\n    weight: .nan\n",
            "recipe.yaml: line 5: parameter 'weight' must be a number, found nan",
        ),
        ("merge_method: ties\nparameters: {{weight: []}}\n" + BARE, "line 2: .* empty list"),
        (
            "merge_method: ties\nparameters: {{weight: [{{fliter: q, value: 1}}]}}\n" + BARE,
            "line 2: 'weight' must be numbers or filters",
        ),
        (
            "merge_method: ties\nparameters: {{weight: [{{value: [1, x]}}]}}\n" + BARE,
            "line 2: .*number, found 'x'",
        ),
        (
            "merge_method: ties\nmodels:\n- {{model: {sql}, parameters: {{weight: 1}}}}\n"
            "- model: {law}\n",
            "recipe.yaml: parameter 'weight' is missing for 'law' at 'model.layers.0",
        ),
        (
            "merge_method: breadcrumbs\nmodels:\n"
            "- {{model: {sql}, parameters: {{weight: 1, gamma: 0.1}}}}\n"
            "- {{model: {law}, parameters: {{weight: 1, gamma: 0.2}}}}\n",
            "gamma differs",
        ),
    ],
)
def test_recipes_that_cannot_be_honoured(recipe, text, what):
    with pytest.raises(lf.LorafoldError, match=what) as e:
        Recipe.read(recipe(text)).merge()
    assert "\n" not in str(e.value)


def test_recipes_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(lf.FileError, match="nothing.yaml"):
        Recipe.read(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(lf.FileError, match="not UTF-8 text"):
        Recipe.read(tmp_path / "bytes.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(lf.MissingExtraError, match=r"lorafold\[merge\]"):
        Recipe.read(tmp_path / "nothing.yaml")


def test_what_the_method_takes_no_notice_of_is_told(models, recipe):
    text = "merge_method: linear\nparameters: {{density: 0.4, lambda: 2}}\n" + ONE
    with pytest.warns(UserWarning, match="linear takes no notice of 'density', 'lambda'"):
        merged = Recipe.read(recipe(text)).merge()
    assert merged.distance(lf.load(models[0] / "sql")) < 1e-5 * merged.norm()


def test_an_alias_and_a_merge_key_say_what_they_stand_for(models, recipe):
    path = recipe(
        "merge_method: task_arithmetic\nmodels:\n"
        "- model: {sql}\n  parameters: &p {{weight: 0.5}}\n"
        "- model: {law}\n  parameters:\n    <<: *p\n    weight: 0.25\n"
    )
    merged = Recipe.read(path).merge()
    sql, law = (lf.load(models[0] / name) for name in ("sql", "law"))
    assert merged.distance(0.5 * sql + 0.25 * law) < 1e-4 * merged.norm()


@pytest.mark.parametrize(("text", "value"), [("1e-1", 0.1), ("-.5", -0.5), ("+1.E1", 10.0)])
def test_numbers_as_everyone_writes_them(models, recipe, text, value):
    """pyyaml takes these for texts; mergekit and YAML 1.2 for numbers."""
    path = recipe(
        "merge_method: task_arithmetic\nparameters: {{weight: VALUE}}\n".replace("VALUE", text)
        + BARE
    )
    merged = Recipe.read(path).merge()
    sql = lf.load(models[0] / "sql")
    assert merged.distance(value * sql) < 1e-5 * merged.norm()


def test_adapters_of_a_recipe_are_read_as_asked(models, recipe, tmp_path):
    (tmp_path / "bare").mkdir()
    file = "adapter_model.safetensors"
    (tmp_path / "bare" / file).write_bytes((models[0] / "sql" / file).read_bytes())
    text = "merge_method: task_arithmetic\n" + ONE.replace("{sql}", f"{tmp_path}/bare")
    assert Recipe.read(recipe(text)).merge(alpha=4).norm() == pytest.approx(
        2 * lf.load(models[0] / "sql").norm(), rel=1e-4
    )


@pytest.mark.parametrize("weight", [[], "x", [1, None], {"fliter": 1}])
def test_a_recipe_made_by_hand_is_checked_too(weight):
    with pytest.raises(lf.MismatchError, match="'weight'"):
        Recipe("ties", None, {"sql": ("sql", {"weight": weight})})
