"""transformers' Trainer with adapters attached: what is trained, saved and resumed."""

import copy

import pytest
import torch

import lorafold as lf

pytestmark = pytest.mark.filterwarnings("ignore")


def llama(seed=0, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def rows(n, seed=0, lengths=(6, 12), adapter=None):
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        length = int(torch.randint(*lengths, (1,), generator=g))
        ids = torch.randint(3, 48, (length,), generator=g).tolist()
        row = {"input_ids": ids, "labels": list(ids)}
        if adapter is not None:
            row["adapter"] = adapter[i % len(adapter)]
        found.append(row)
    return found


class Padded:
    """A collator that pads, and masks what it padded."""

    def __call__(self, features):
        width = max(len(f["input_ids"]) for f in features)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for f in features:
            more = width - len(f["input_ids"])
            batch["input_ids"].append([*f["input_ids"], *[0] * more])
            batch["labels"].append([*f["labels"], *[-100] * more])
            batch["attention_mask"].append([1] * len(f["input_ids"]) + [0] * more)
        return {key: torch.tensor(value) for key, value in batch.items()}


class Flat:
    """A collator that lays the rows end to end."""

    def __call__(self, features):
        ids = [i for f in features for i in f["input_ids"]]
        labels = [i for f in features for i in [-100, *f["labels"][1:]]]
        places = [i for f in features for i in range(len(f["input_ids"]))]
        batch = {"input_ids": ids, "labels": labels, "position_ids": places}
        return {key: torch.tensor([value]) for key, value in batch.items()}


def arguments(folder, **options):
    from transformers import TrainingArguments

    given = {
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "weight_decay": 0.1,
        "dataloader_pin_memory": False,
        "seed": 3,
        **options,
    }
    return TrainingArguments(str(folder), **given)


def trainer(folder, spec=None, *, data=None, collator=None, model=None, **options):
    model = llama() if model is None else model
    own = {k: options.pop(k) for k in ("lora_plus", "random_rank", "eval_dataset") if k in options}
    if spec is not None:
        lf.attach(model, spec)
    return lf.train.Trainer(
        model,
        arguments(folder, **options),
        data_collator=collator or Padded(),
        train_dataset=rows(16) if data is None else data,
        **own,
    )


def factors(live, name=None):
    return [p.detach().clone() for p in live.parameters(name)]


def losses(t):
    return [row["loss"] for row in t.state.log_history if "loss" in row]


SPECS = {
    "lora": lambda: lf.LoRA(rank=4, seed=0),
    "pissa": lambda: lf.PiSSA(rank=16, mean=0.01),
    "nested": lambda: lf.LoRA(rank=4, nested=(1, 2, 4), seed=0),
    "start": lambda: lf.LoRA(rank=4, init="pissa", seed=0),
}


@pytest.mark.parametrize("kind", SPECS)
def test_it_trains_and_saves_the_adapter_alone(kind, tmp_path):
    t = trainer(tmp_path / "out", SPECS[kind](), max_steps=12, save_strategy="steps", save_steps=6)
    before = copy.deepcopy({k: v for k, v in t.model.state_dict().items() if "lorafold" not in k})
    t.train()
    assert sum(losses(t)[-3:]) < sum(losses(t)[:3])
    for key, value in before.items():
        assert torch.equal(t.model.state_dict()[key], value)
    folder = tmp_path / "out" / "checkpoint-12"
    size = sum(f.stat().st_size for f in folder.glob("*adapter*"))
    assert size
    assert not list(folder.glob("model*"))
    assert not list(folder.glob("pytorch_model*"))
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    again = llama()
    lf.attach(again, folder).use("default")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    t.model.eval()
    torch.testing.assert_close(again(ids).logits, t.model(ids).logits, atol=1e-4, rtol=1e-4)
    logged = [row for row in t.state.log_history if "loss" in row]
    assert logged[-1]["rank"] == t.live.adapter("default").rank
    assert logged[-1]["norm"] > 0
    assert logged[-1]["moved"] > 0
    assert logged[-1]["trainable"] == sum(p.numel() for p in t.live.parameters())


@pytest.mark.parametrize("kind", SPECS)
def test_resumed_it_goes_on_as_if_it_had_not_stopped(kind, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trainer(tmp_path / "a", SPECS[kind](), gradient_accumulation_steps=2, **options)
    whole.train()
    again = trainer(tmp_path / "a", SPECS[kind](), gradient_accumulation_steps=2, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    for p, q in zip(factors(whole.live), factors(again.live), strict=True):
        assert torch.equal(p, q)


def test_random_ranks_go_on_as_well(tmp_path):
    def make():
        model = llama()
        live = lf.attach(model, lf.LoRA(rank=8, seed=0))
        ranks = lf.train.RandomRank(live, seed=5)
        options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        return trainer(tmp_path / "a", model=model, random_rank=ranks, **options), ranks

    whole, ranks = make()
    drawn = [ranks.at(step) for step in range(200)]
    assert set(drawn) == set(range(1, 9))
    assert drawn == [make()[1].at(step) for step in range(200)]
    whole.train()
    again, _ = make()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(whole)


def test_the_best_one_is_loaded(tmp_path):
    t = trainer(
        tmp_path / "a",
        lf.LoRA(rank=4, seed=0),
        max_steps=6,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.3,
        eval_dataset=rows(8, seed=9),
    )
    t.train()
    best = lf.load(t.state.best_model_checkpoint)
    assert t.live.adapter("default").distance(best) / best.norm() < 1e-5


def test_lora_plus_steps_faster_in_b(tmp_path):
    t = trainer(tmp_path, lf.LoRA(rank=4, seed=0), lora_plus=8.0)
    t.create_optimizer()
    rates = {id(p): g["lr"] for g in t.optimizer.param_groups for p in g["params"]}
    named = dict(t.model.named_parameters())
    A = [p for n, p in named.items() if n.endswith(".A")]
    B = [p for n, p in named.items() if n.endswith(".B")]
    assert {rates[id(p)] for p in A} == {0.02}
    assert {rates[id(p)] for p in B} == {0.16}
    assert len(A) + len(B) == len(rates)
    with pytest.raises(lf.MismatchError, match="lora_plus"):
        trainer(tmp_path, lf.LoRA(rank=4), lora_plus=0)


# Many adapters


NAMES = ("a", "b", "c")


def many(folder, names=NAMES, data=None, dtype=torch.float32, **options):
    model = llama().to(dtype)
    specs = {n: lf.LoRA(rank=2 + i, seed=i, dtype=dtype) for i, n in enumerate(NAMES)}
    lf.attach(model, {n: specs[n] for n in names})
    return trainer(folder, model=model, data=data, **options)


@pytest.mark.parametrize("collator", [Padded, Flat])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_of_many_is_what_it_is_alone(collator, accumulate, tmp_path, sequential):
    # Every step sees rows of "a" and "b" in other numbers, and none of "c" in the first two.
    order = ["a", "a", "a", "b", "a", "b", "b", "b", "c", "a", "b", "c", "a", "c", "c", "b"]
    data = rows(16, seed=4, adapter=order)
    options = {
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 4 // accumulate,
        "max_grad_norm": 0.05,  # clips every one of them
        "max_steps": 4,
    }
    # In float64, as Adam makes whole steps of what is rounding in float32.
    options["dtype"] = torch.float64
    together = many(tmp_path / "all", data=data, collator=collator(), **options)
    together.train()
    for name in NAMES:
        # Alone: the same steps, on its own rows; a step without any is none.
        chunks = [data[i : i + 4] for i in range(0, 16, 4)]
        mine = [[r for r in chunk if r["adapter"] == name] for chunk in chunks]
        alone, i = llama().double(), NAMES.index(name)
        live = lf.attach(alone, lf.LoRA(rank=2 + i, seed=i, dtype=torch.float64))
        optimizer = torch.optim.AdamW(live.parameters(), 0.02, weight_decay=0.1)
        alone.train()
        for step in [m for m in mine if m]:
            total, count = 0.0, 0
            for row in step:
                ids = torch.tensor([row["input_ids"]])
                logits = alone(ids).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(
                    logits, ids[0, 1:], reduction="sum"
                )
                count += ids.shape[1] - 1
            optimizer.zero_grad()
            (total / count).backward()
            torch.nn.utils.clip_grad_norm_(list(live.parameters()), 0.05)
            optimizer.step()
        for p, q in zip(factors(together.live, name), factors(live), strict=True):
            torch.testing.assert_close(p, q, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_held_out_loss_of_many_does_not_depend_on_the_batches(batch, tmp_path):
    data = rows(16, seed=4, adapter=["a", "a", "a", "b", "c"])
    t = many(tmp_path, data=data, eval_dataset=data, per_device_eval_batch_size=batch)
    with torch.no_grad():
        for p in t.live.parameters():
            p.add_(0.1)
    found = t.evaluate()
    whole = 0.0
    for name in NAMES:
        sums = count = 0
        for row in (row for row in data if row["adapter"] == name):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad(), t.live.use(name):
                logits = t.model(ids).logits[0, :-1]
            sums += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
        assert abs(found[f"eval_loss/{name}"] - sums / count) < 1e-4
        whole += sums / count
    assert abs(found["eval_loss"] - whole) < 1e-4


def test_many_are_saved_each_alone_and_go_on(tmp_path):
    data = rows(16, adapter=NAMES)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "data": data}
    whole = many(tmp_path / "out", **options)
    whole.train()
    for name in NAMES:
        assert lf.load(
            tmp_path / "out" / "checkpoint-2" / "adapters" / name
        ).rank == 2 + NAMES.index(name)
    again = many(tmp_path / "out", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert losses(again) == losses(whole)


def test_a_column_that_names_nobody(tmp_path):
    t = many(tmp_path, data=rows(8, adapter=["a", "aa"]))
    with pytest.raises(lf.UnknownNameError, match=r"column adapter names 'aa'.*'a'"):
        t.train()
    datasets = pytest.importorskip("datasets")
    with pytest.raises(lf.UnknownNameError, match="'nobody'"):
        many(tmp_path, data=datasets.Dataset.from_list(rows(4, adapter=["nobody"])))
    mixed = [*rows(2, adapter=["a"]), *rows(2)]
    with pytest.raises(lf.MismatchError, match="some have none"):
        many(tmp_path, data=mixed).train()
    with pytest.raises(lf.MismatchError, match="must hold names, found 3"):
        many(tmp_path, data=rows(4, adapter=[3])).train()


def test_what_is_no_model_with_adapters(tmp_path):
    with pytest.raises(lf.MismatchError, match="nothing is attached"):
        trainer(tmp_path)
    model = llama()
    u = lf.LowRank(torch.randn(2, 32), torch.randn(32, 2))
    lf.attach(model, lf.Adapter({"model.layers.0.self_attn.q_proj": u}))
    with pytest.raises(lf.MismatchError, match="no adapter is trained here"):
        trainer(tmp_path, model=model)
    with pytest.raises(lf.MismatchError, match="give the model itself"):
        lf.train.Trainer("base")


@pytest.mark.parametrize("kind", [*SPECS, "loadings"])
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=["checkpointing", "bf16"]
)
def test_every_kind_trains_with_the_librarys_own_options(kind, options, tmp_path):
    def spec():
        if kind in SPECS:
            return SPECS[kind]()
        paths = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
        g = torch.Generator().manual_seed(0)
        shared = {p: torch.randn(4, 32, generator=g) for p in paths}
        made = {
            name: lf.Adapter(
                {p: lf.LowRank(A, torch.randn(32, 4, generator=g)) for p, A in shared.items()}
            )
            for name in "xyz"
        }
        return lf.Loadings(lf.fold(made, form="output", rank=4), seed=0)

    found = []
    for more in ({}, options):
        t = trainer(tmp_path, spec(), max_steps=6, eval_dataset=rows(16), **more)
        before = t.evaluate()["eval_loss"]
        t.train()
        assert t.evaluate()["eval_loss"] < before
        assert all(p.dtype == torch.float32 for p in t.live.parameters())
        found.append(losses(t))
    for p, q in zip(*found, strict=True):
        assert abs(p - q) < (0.1 if "bf16" in options else 1e-4)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"bf16": True}], ids=["checkpointing", "bf16"]
)
def test_with_the_librarys_own_options(options, tmp_path):
    data = rows(16, adapter=NAMES)
    plain = many(tmp_path / "a", data=data)
    plain.train()
    other = many(tmp_path / "b", data=data, **options)
    other.train()
    for p, q in zip(losses(plain), losses(other), strict=True):
        assert abs(p - q) < (0.1 if "bf16" in options else 1e-4)


def test_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = llama()
    lf.quantize_base(model, bits=4, kind="nf4", group_size=32)
    lf.attach(model, {n: lf.LoRA(rank=4, seed=0) for n in NAMES})
    t = trainer(tmp_path, model=model, data=rows(16, adapter=NAMES), max_steps=8)
    t.train()
    assert losses(t)[-1] < losses(t)[0]


def test_a_callback_saves_and_measures_for_the_librarys_own_trainer(tmp_path):
    import transformers

    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    callback = lf.train.AdapterCallback(live)
    t = transformers.Trainer(
        model,
        arguments(tmp_path / "a", save_strategy="steps", save_steps=2),
        data_collator=Padded(),
        train_dataset=rows(16),
        callbacks=[callback],
    )
    t.train()
    saved = lf.load(tmp_path / "a" / "checkpoint-4")
    assert saved.distance(live.adapter("default")) / saved.norm() < 1e-6
    assert [row["rank"] for row in t.state.log_history if "loss" in row] == [4] * 4
    # transformers opens it as a base with an adapter, which it is.
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    expected = model.eval()(**batch).logits
    assert torch.allclose(opened.eval()(**batch).logits, expected, atol=1e-5)
    with live.use(None):
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-2)
    callback.resume_from(tmp_path / "a" / "checkpoint-2")
    assert saved.distance(live.adapter("default")) / saved.norm() > 1e-3


def test_the_librarys_own_trainer_goes_on_as_if_it_had_not_stopped(tmp_path):
    import transformers

    def trained(folder, resume=None):
        model = llama()
        live = lf.attach(model, lf.LoRA(rank=4, seed=0))
        transformers.Trainer(
            model,
            arguments(folder, save_strategy="steps", save_steps=2),
            data_collator=Padded(),
            train_dataset=rows(16),
            callbacks=[lf.train.AdapterCallback(live)],
        ).train(resume_from_checkpoint=resume)
        return live.adapter("default")

    whole = trained(tmp_path / "a")
    resumed = trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.distance(whole) / whole.norm() < 1e-6


# A controller


def controlled(folder, shock=(), **options):
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is sure of itself, and texts differ in loss
    live = lf.attach(model, lf.LoRA(rank=8, seed=0))
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.005)
    tuning = lf.train.Tuning(warmup=4, window=16, stable=2, hot=3.0)
    controller = lf.OrbitalController(live, optimizer, (2, 4, 8), every=1, tuning=tuning)
    data = rows(4, seed=1) * 40
    for i in shock:  # labels that have nothing to do with the text
        data[4 * i : 4 * i + 4] = rows(4, seed=77 + i)
    t = lf.train.Trainer(
        model,
        arguments(folder, **{"max_steps": 24, **options}),
        data_collator=Padded(),
        train_dataset=data,
        optimizers=(optimizer, None),
        controller=controller,
    )
    return t, controller


def test_a_controller_reads_what_is_trained_on_and_goes_on(tmp_path, sequential):
    options = {"save_strategy": "steps", "save_steps": 10}
    whole, controller = controlled(tmp_path / "a", shock=(18, 19, 20), **options)
    whole.train()
    assert "LOW" in [event.state for event in controller.events]
    again, other = controlled(tmp_path / "a", shock=(18, 19, 20), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert losses(again) == losses(whole)
    assert other.events == controller.events


def test_a_controller_by_a_callback_reads_a_probe(tmp_path):
    import transformers

    model = llama()
    live = lf.attach(model, lf.LoRA(rank=8, seed=0))
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.005)
    controller = lf.OrbitalController(live, optimizer, (2, 4, 8), every=2)
    callback = lf.train.OrbitalCallback(controller, Padded()(rows(2, seed=5)))
    t = transformers.Trainer(
        model,
        arguments(tmp_path / "a", save_strategy="steps", save_steps=4),
        data_collator=Padded(),
        train_dataset=rows(16),
        optimizers=(optimizer, None),
        callbacks=[callback],
    )
    t.train()
    assert controller.state_dict()["readings"] == 2
    state = controller.state_dict()
    controller.step(3.0)
    callback.resume_from(tmp_path / "a" / "checkpoint-4")
    assert controller.state_dict() == state


def test_trained_adapters_that_no_row_names_are_an_error(tmp_path):
    with pytest.raises(lf.MismatchError, match="'b', 'c' would not be trained"):
        many(tmp_path, data=rows(8)).train()
    t = many(tmp_path, data=rows(8), max_steps=1)
    t.live.use(dict.fromkeys(NAMES, 1.0))  # all of them at once are what every row runs
    t.train()
    live = lf.attach(model := llama(), {n: lf.LoRA(rank=4, seed=0) for n in NAMES})
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.1)
    controller = lf.OrbitalController(live, optimizer, (1, 2, 4), name="a")
    with pytest.raises(lf.MismatchError, match="controller= judges one adapter"):
        lf.train.Trainer(model, arguments(tmp_path), controller=controller)


def test_batches_of_one_step_agree_on_the_column(tmp_path, sequential):
    data = [*rows(4, adapter=["a"]), *rows(4)]
    t = many(tmp_path, data=data, gradient_accumulation_steps=2, max_steps=1)
    with pytest.raises(lf.MismatchError, match="of one step's batches"):
        t.train()
