"""What `unfold` writes is what Ray Serve's LLM deployments load: a folder of folders in a bucket.

Ray's own code lists the adapters and fetches them. It is there with `ray[serve]` and boto3.
"""

import asyncio
import types

import pytest
import torch

import lorafold as lf
from lorafold.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's imports


@pytest.fixture
def ray_serve():
    """Its functions for adapters."""
    common = pytest.importorskip("ray.llm._internal.common.utils.lora_utils")
    serve = pytest.importorskip("ray.llm._internal.serve.utils.lora_serve_utils")
    config = pytest.importorskip("ray.llm._internal.serve.core.configs.llm_config")
    return types.SimpleNamespace(
        ids=common.get_lora_model_ids, loader=serve.LoraModelLoader, config=config.LoraConfig
    )


@pytest.fixture
def unfolded(s3, tmp_path):
    """(the library, the URL that it was unfolded to)."""

    def adapter(seed):
        g = torch.Generator().manual_seed(seed)
        ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 2}
        return lf.Adapter(
            {
                path: lf.LowRank(
                    torch.randn(k, 32, generator=g), torch.randn(32, k, generator=g), scale=0.5
                )
                for path, k in ranks.items()
            }
        )

    sources = {name: adapter(i) for i, name in enumerate(["sql", "polite", "team:a/b"])}
    library = lf.fold(sources, tmp_path / "lib", tolerance=0.01)
    url = f"{s3.url}/loras"
    options = ["--pad", "--base-model", "org/base", "--dtype", "bfloat16"]
    main(["unfold", str(tmp_path / "lib"), "-o", url, *options], standalone_mode=False)
    yield library, url
    library.close()


def test_every_adapter_is_a_folder_of_its_own_that_any_reader_takes(unfolded, s3):
    library, url = unfolded
    files = {name.partition("/")[::2] for name in s3.files("loras") if "/" in name}
    folders = {folder for folder, _ in files}
    assert len(folders) == len(library)
    assert {"sql", "polite"} <= folders
    for folder in folders:
        assert (folder, "adapter_config.json") in files
        assert (folder, "adapter_model.safetensors") in files
        config = lf.load(f"{url}/{folder}").config
        assert config["base_model_name_or_path"] == "org/base"
        assert not config["rank_pattern"]  # one rank for all


def test_ray_serve_lists_and_loads_them(unfolded, ray_serve, tmp_path):
    library, url = unfolded
    ids = ray_serve.ids(url, "base")
    names = {"base:sql": "sql", "base:polite": "polite"}
    names |= {model: "team:a/b" for model in ids if model not in names}
    assert sorted(ids) == sorted(names)
    assert len(ids) == 3
    config = types.SimpleNamespace(lora_config=ray_serve.config(dynamic_lora_loading_path=url))
    loader = ray_serve.loader(lora_root=str(tmp_path / "cache"))
    for model, name in names.items():
        found = asyncio.run(loader.load_model_from_config(model, config))
        loaded = lf.load(found.local_path)
        expected = library[name]
        assert loaded.modules.keys() == expected.modules.keys()
        assert loaded.distance(expected) < 2**-7 * expected.norm()
