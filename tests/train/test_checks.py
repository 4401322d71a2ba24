"""What would be trained and lost, or not trained at all, is told."""

import pytest
import torch

import lorafold as lf
from lorafold.train.checks import trained_now

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=24, **sizes, **heads))


def rows(n, **more):
    g = torch.Generator().manual_seed(0)
    found = torch.randint(24, (n, 6), generator=g)
    return [
        {"input_ids": row, "labels": row, **{key: value[i] for key, value in more.items()}}
        for i, row in enumerate(found)
    ]


def trainer(folder, model, data=None, **options):
    from transformers import TrainingArguments

    more = {k: options.pop(k) for k in ("optimizers", "lora_plus") if k in options}
    given = {"max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(
        str(folder), use_cpu=True, dataloader_pin_memory=False, **{**given, **options}
    )
    return lf.train.Trainer(model, args, train_dataset=data or rows(8), **more)


def attached(spec=None):
    model = llama()
    return model, lf.attach(model, lf.LoRA(rank=2, seed=0) if spec is None else spec)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (lambda live: live.use(None), r"'default' would not be trained: it is switched off"),
        (lambda live: live.use("default", c=0.0), "switched off"),
        (lambda live: live.merge({"default": 1.0}), "merged into the weights"),
        (lambda live: live.model.requires_grad_(False), "require no gradients"),
    ],
    ids=["off", "c=0", "merged", "frozen"],
)
def test_what_would_not_train(how, match, tmp_path):
    model, live = attached()
    how(live)
    with pytest.raises(lf.MismatchError, match=match):
        trainer(tmp_path, model).train()
    assert live.adapter("default").norm() == 0


def test_parameters_of_the_base_that_would_be_trained_and_lost(tmp_path):
    model, _ = attached()
    model.lm_head.requires_grad_(True)
    with pytest.raises(lf.RefusedError, match=r"lm_head.weight of the base would be trained"):
        trainer(tmp_path, model).train()
    model, live = attached(lf.LoRA(rank=2, modules_to_save=["lm_head"], seed=0))
    trainer(tmp_path, model).train()
    assert live.adapter("default").extras


def test_rates_for_an_optimiser_that_is_given(tmp_path):
    model, live = attached()
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.01)
    with pytest.raises(lf.MismatchError, match=r"lora_plus= .* optimizers= brings one"):
        trainer(tmp_path, model, optimizers=(optimizer, None), lora_plus=4.0)


def test_the_next_round_beside_what_is_kept(tmp_path):
    model, live = attached({"first": lf.LoRA(rank=2, seed=0)})
    trainer(tmp_path, model, learning_rate=0.05).train()
    live.keep("first", 0.5)
    first = [p.detach().clone() for p in live.parameters("first")]
    live.add(lf.LoRA(rank=2, seed=1), "second")
    live.use("second")
    assert trained_now(live) == ["second"]
    t = trainer(tmp_path / "a", model, learning_rate=0.05, save_strategy="steps", save_steps=2)
    t.train()
    assert live.adapter("second").norm() > 0
    for p, before in zip(live.parameters("first"), first, strict=True):
        assert torch.equal(p, before)
    saved = lf.load(tmp_path / "a" / "checkpoint-2")
    assert saved.distance(live.adapter("second")) < 1e-6 * saved.norm()


def test_a_callback_of_another_model_or_of_adapters_that_do_not_run(tmp_path):
    import transformers

    def fit(model, live):
        args = trainer(tmp_path, attached()[0], max_steps=1).args
        callback = lf.train.AdapterCallback(live)
        transformers.Trainer(model, args, train_dataset=rows(8), callbacks=[callback]).train()

    model, live = attached()
    with pytest.raises(lf.MismatchError, match="another model than the handle's"):
        fit(llama(), live)
    fit(model, live)
    model, live = attached({n: lf.LoRA(rank=2, seed=0) for n in "ab"})
    with pytest.raises(lf.MismatchError, match="'b' would not be trained"):
        fit(model, live)
    live.use({"a": 1.0, "b": 1.0})
    fit(model, live)
    model = llama()
    u = lf.LowRank(torch.randn(2, 16), torch.randn(16, 2))
    live = lf.attach(model, lf.Adapter({"model.layers.0.self_attn.q_proj": u}))
    with pytest.raises(lf.MismatchError, match="no adapter is trained here"):
        fit(model, live)
