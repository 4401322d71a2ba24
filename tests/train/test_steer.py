"""Runs of steering: pairs, rounds, calibration, what is written, going on after a stop, a sweep."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch.nn import functional as F

import lorafold as lf
from lorafold.train.steering.loss import steering_loss
from lorafold.train.steering.options import Options
from lorafold.train.steering.pairs import Pair, pairs_of
from lorafold.train.steering.state import load_run, save_run
from lorafold.train.steering.steer import Run
from lorafold.train.steering.sweep import repeated
from lorafold.train.steering.tokens import (
    Tokens,
    batch_of,
    batches,
    continued,
    encoded,
    prompts_for,
    prompts_of,
    split,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"steps": 12, "batch": 8, "every": 4, "lr": 0.02, "kl": 0.3, "tokens": 6}


class Letters:
    """A tokenizer: a token a letter."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) % 64 for c in text]}

    def decode(self, ids):
        return "".join(chr(64 + i) for i in ids)


def llama(seed=0, scale=6.0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    ends = {"eos_token_id": None, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads, **ends)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def rows(n=24):
    letters = itertools.cycle("abcdefghijklmnop")
    made = []
    for k in range(n):
        word = "".join(next(letters) for _ in range(3)) + chr(65 + k)
        made.append(
            {"prompt": word, "chosen": "ABBA"[: 2 + k % 3], "rejected": "yzzy"[: 2 + k % 2]}
        )
    return made


def steered(model, **options):
    return lf.train.steer(
        model, Letters(), rows(), options.pop("kind", lf.LoRA(rank=2, seed=0)), **SMALL | options
    )


@pytest.fixture(scope="module")
def two_rounds():
    model = llama()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    dial = steered(model, kind=[lf.LoRA(rank=2), lf.PiSSA(rank=3)], rounds=2)
    return model, weights, dial


# Pairs


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: a pair must be an object"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: it lacks 'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 2: chosen and rejected are the"),
        ('{"prompt": "a", "chosen": "", "rejected": "b"}', "line 2: chosen is empty"),
        ('{"prompt": ["a"], "chosen": "c", "rejected": "b"}', "line 2: prompt must be a text"),
    ],
)
def test_bad_lines_are_named_by_file_and_line(line, says, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + f"\n{line}\n")
    with pytest.raises(lf.FileError, match=says) as e:
        lf.train.read_pairs(path)
    assert str(path) in str(e.value)


def test_files_without_pairs(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, says in (("empty", "no pairs in it"), ("bytes", "not UTF-8"), ("none", "No such")):
        with pytest.raises(lf.FileError, match=says):
            lf.train.read_pairs(tmp_path / f"{name}.jsonl")
    (tmp_path / "pairs.csv").write_text('prompt,chosen,rejected\na,"b,",c\n')
    assert lf.train.read_pairs(tmp_path / "pairs.csv") == [Pair("a", "b,", "c")]
    with pytest.raises(lf.MismatchError, match="pair 1: it lacks 'prompt'"):
        pairs_of([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(lf.MismatchError, match="there are no pairs"):
        pairs_of([])


def test_what_is_too_long_is_cut_or_left_out_and_counted():
    pairs = [Pair("abcdef", "xx", "yyy"), Pair("ab", "x", "y"), Pair("a", "x" * 9, "y")]
    found = encoded(pairs, Letters(), 8)
    assert (found.cut, found.dropped) == (1, 1)
    assert found.pairs[0].prompt == encoded(pairs[:1], Letters(), None).pairs[0].prompt[-5:]
    with pytest.raises(lf.MismatchError, match="none of the 1 pairs fits"):
        encoded(pairs[2:], Letters(), 8)


def test_pairs_of_one_prompt_are_not_torn_apart():
    pairs = [Tokens((k % 5,), (1,), (k,)) for k in range(20)]
    train, held = split(pairs, 0.3, 0)
    assert len(train) + len(held) == 20
    assert not {p.prompt for p in train} & {p.prompt for p in held}
    with pytest.raises(lf.MismatchError, match="one prompt only"):
        split(pairs[:1], 0.3, 0)


def test_batches_go_on_where_they_were_left():
    pairs = [Tokens((k,), (1,), (2,)) for k in range(7)]
    first = list(itertools.islice(batches(pairs, 2, 0), 9))
    assert list(itertools.islice(batches(pairs, 2, 0, skip=5), 4)) == first[5:]
    assert len({p.prompt for batch in first[:3] for p in batch}) == 6


def test_a_batch_predicts_answers_only():
    given = batch_of([Tokens((5, 6), (7,), (8, 9)), Tokens((4,), (3, 2), (1,))])["chosen"]
    assert given["labels"].tolist() == [[-100, -100, 7], [-100, 3, 2]]
    assert given["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_prompts_of_other_lengths_are_continued_as_alone():
    model = llama()
    pairs = [Tokens(tuple(range(3, 3 + n)), (1,), (2,)) for n in (2, 5, 9)]
    together = continued(model, prompts_of(pairs), 4)
    with torch.no_grad():
        logits = model(**together.given).logits
        for i, pair in enumerate(pairs):
            alone = continued(model, prompts_of([pair]), 4)
            assert together.tokens[i].tolist() == alone.tokens[0].tolist()
            theirs = model(**alone.given).logits[0, -4:]
            torch.testing.assert_close(logits[i, -4:], theirs, atol=1e-4, rtol=1e-4)


def test_continuations_stay_within_the_context():
    model = llama()
    long = Tokens(tuple(range(1, 31)), (1,), (2,))
    assert prompts_for(model, [long], 5)["input_ids"].tolist() == [list(range(4, 31))]
    assert prompts_for(model, [long], 2)["input_ids"].shape == (1, 30)
    with pytest.raises(lf.MismatchError, match="tokens must be below 32"):
        steered(model, tokens=32)


def test_what_follows_an_end_is_not_the_models_text():
    model = llama()
    prompts = prompts_of([Tokens((3, 4), (1,), (2,))])
    prompts = {key: value.repeat(2, 1) for key, value in prompts.items()}
    prompts["input_ids"][1] += 7  # so that the rows end at different places, if at all
    free = continued(model, prompts, 6).tokens
    end = int(free[0, 2])
    model.generation_config.eos_token_id = end
    ended = continued(model, prompts, 6)
    for row, written in zip(ended.tokens.tolist(), ended.written.tolist(), strict=True):
        stop = row.index(end) + 1 if end in row else len(row)
        assert written == [k < stop for k in range(len(row))]
    assert not ended.written[0].all() or ended.tokens.shape[1] < 6


# Runs


def test_a_dial_of_two_rounds(two_rounds):
    model, weights, dial = two_rounds
    assert [r.rank for r in dial.rounds] == [2, 3]
    assert dial.adapter.rank == 5
    for r in dial.rounds:
        best = next(j for j in r.judged if j.step == r.best)
        assert r.best > 0
        assert min(best.margins) > 0
        assert best.loss < r.judged[0].loss
    # One plain adapter is all of it, and c = 0 is the base to the bit.
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        fresh = llama()
        base = fresh(ids).logits
        with dial.live.use("dial", c=0):
            assert torch.equal(model(ids).logits, base)
        for c in (-1.0, 0.7):
            state = (c * dial.adapter).apply_to(weights)
            fresh.load_state_dict(state)
            with dial.live.use("dial", c=c):
                torch.testing.assert_close(
                    model(ids).logits, fresh(ids).logits, atol=1e-4, rtol=1e-4
                )


def test_both_signs_of_what_is_kept_mirror_each_other():
    model = llama()
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    live = lf.attach(model, {"a": lf.LoRA(rank=2, seed=0), "b": lf.LoRA(rank=3, seed=1)})
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.05)
    live.gate = lf.train.proportional
    live.keep("a", 0.5)
    whole = lf.train.joined_rounds(live, {"b": 1.0})
    assert whole.distance(0.5 * live.adapter("a") + live.adapter("b")) < 1e-5 * whole.norm()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        for c in (-1.5, 0.0, 1.0):
            with live.use("b", c=c):
                found = model(ids).logits
            fresh = llama()
            fresh.load_state_dict((c * whole).apply_to(weights))
            torch.testing.assert_close(found, fresh(ids).logits, atol=1e-4, rtol=1e-4)
    live.drop("a")
    with pytest.raises(lf.MismatchError, match="nothing is kept"):
        lf.train.joined_rounds(live)


def test_the_reference_may_be_what_is_kept():
    model = llama()
    live = lf.attach(model, {"a": lf.LoRA(rank=2, seed=0), "b": lf.LoRA(rank=3, seed=1)})
    with torch.no_grad():
        for p in live.parameters("a"):
            p.add_(0.1)
    live.gate = lf.train.proportional
    live.keep("a")
    batch = batch_of(encoded(pairs_of(rows(6)), Letters(), None).pairs)
    kept = steering_loss(model, live, batch, name="b", reference="kept")
    assert float(kept.kl.abs().max()) == 0  # B = 0: nothing but the kept round runs, on both sides
    assert kept.margins == (0.0, 0.0)
    base = steering_loss(model, live, batch, name="b")
    assert float(base.kl.max()) > 1e-3
    with pytest.raises(lf.MismatchError, match="reference must be 'base' or 'kept'"):
        steering_loss(model, live, batch, name="b", reference="last")


def test_the_calibrated_strength_is_true_of_weights_with_the_adapter_merged(two_rounds):
    _, weights, dial = two_rounds
    last = dial.rounds[-1].calibration
    pairs = encoded(pairs_of(rows()), Letters(), 32).pairs
    held = split(pairs, 0.2, 0)[1]
    moved, base = llama(), llama()
    moved.load_state_dict(dial.adapter.apply_to(weights))
    found = []
    with torch.no_grad():
        for prompt in dict.fromkeys(p.prompt for p in held):
            ids = torch.tensor([prompt])
            for _ in range(SMALL["tokens"]):
                p, q = (m(ids).logits[0, -1].log_softmax(-1) for m in (moved, base))
                found.append(float((p.exp() * (p - q)).sum()))
                ids = torch.cat([ids, p.argmax()[None, None]], 1)
    at = float(torch.quantile(torch.tensor(found), 0.95))
    assert at == pytest.approx(last.kl, rel=0.02)
    assert last.converged == (abs(last.kl / SMALL["kl"] - 1) <= 0.05)
    assert len(last.tried) <= 12


def test_what_is_written_is_a_plain_adapter(two_rounds, tmp_path):
    _, _, dial = two_rounds
    lf.save(dial.adapter, tmp_path / "dial")
    loaded = lf.load(tmp_path / "dial")
    assert loaded.distance(dial.adapter) < 1e-5 * dial.adapter.norm()
    smaller = dial.adapter.resize(tolerance=0.5)
    assert smaller.distance(dial.adapter) <= 0.5 * dial.adapter.norm()


def stopping_after(steps):
    calls = itertools.count()
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("steps", [0, 5, 14])
def test_a_run_goes_on_as_if_it_had_not_been_left(steps, tmp_path):
    options = Options(kind=lf.LoRA(rank=2), rounds=2, patience=9, **SMALL)
    whole = Run(llama(), Letters(), rows(), options)
    assert whole.go()
    left = Run(llama(), Letters(), rows(), options)
    assert not left.go(stop=stopping_after(steps))
    save_run(left, tmp_path / "left")
    again = Run(llama(), Letters(), rows(), options)
    load_run(again, tmp_path / "left")
    assert again.go()
    want, got = whole.finished(), again.finished()
    assert [r.best for r in want.rounds] == [r.best for r in got.rounds]
    # Steps are the same; what is read back of a kept round may be rounded.
    assert want.adapter.distance(got.adapter) < 1e-4 * want.adapter.norm()


def test_a_run_goes_on_with_the_same_only(tmp_path):
    options = Options(kind=lf.LoRA(rank=2), **SMALL)
    run = Run(llama(), Letters(), rows(), options)
    run.go(stop=stopping_after(1))
    save_run(run, tmp_path / "left")
    other = dataclasses.replace(options, batch=4)
    for made, says in (
        (Run(llama(), Letters(), rows(), other), "run with batch 8, and not 4"),
        (Run(llama(), Letters(), rows(20), options), "with other pairs"),
    ):
        with pytest.raises(lf.MismatchError, match=says):
            load_run(made, tmp_path / "left")
    with pytest.raises(lf.FileError, match="no run to go on with"):
        load_run(run, tmp_path / "nowhere")
    (tmp_path / "left" / "run.safetensors").write_bytes(b"none")
    with pytest.raises(lf.FileError, match="too few for a safetensors file"):
        load_run(run, tmp_path / "left")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_kept_round_is_what_was_written(name, tmp_path):
    options = Options(kind=lf.LoRA(rank=2), rounds=2, **SMALL)
    run = Run(llama(), Letters(), rows(), options)
    assert not run.go(stop=lambda: len(run.done) == 1)
    save_run(run, tmp_path / "left")
    path = tmp_path / "left" / "round1" / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(lf.FileError, match=f"round1/{name} is not what was written"):
        load_run(Run(llama(), Letters(), rows(), options), tmp_path / "left")


def test_a_loss_that_is_not_finite_is_told_and_the_model_let_go():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(lf.MismatchError, match=r"not finite after 0 steps: give a smaller lr="):
        steered(model)
    assert not [m for m in model.modules() if hasattr(m, "lorafold")]


def test_a_round_that_brings_nothing():
    with pytest.raises(lf.MismatchError, match="no step of the first round"):
        steered(llama(), lr=1e4, steps=2, every=1)
    run = Run(llama(), Letters(), rows(), Options(kind=lf.LoRA(rank=2), rounds=3, **SMALL))
    run.go(stop=stopping_after(13))
    assert len(run.done) == 1
    run.options = dataclasses.replace(run.options, lr=1e4)
    run.now.optimizer.param_groups[0]["lr"] = 1e4
    assert run.go()  # the second is left out, and no third is tried
    assert [r.best > 0 for r in run.done] == [True, False]
    assert run.finished().adapter.rank == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 0}, "rounds must be a whole number"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"heldout": 1.5}, "heldout must lie between"),
        ({"kl": 0.0}, "kl must be a positive number"),
        ({"reference": "x"}, "reference must be"),
        ({"kind": lf.LoRA(dropout=0.1)}, "dropout="),
        ({"kind": lf.LoRA(modules_to_save="lm_head")}, "modules_to_save="),
        ({"kind": [lf.LoRA(), lf.LoRA()], "rounds": 3}, "2 specifications for 3 rounds"),
        ({"kind": "lora"}, "kind must be"),
        ({"step": 3}, "step"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(lf.MismatchError, match=says):
        steered(llama(), **options)


# Sweeps


def test_a_sweep_says_what_each_strength_does(two_rounds):
    model, _, dial = two_rounds
    texts = ["abcdefgh", "ABCD"]
    found = lf.train.sweep(
        dial.live,
        Letters(),
        rows(),
        strengths=(-1, 0, 1),
        texts=texts,
        tokens=6,
        score=lambda text: float(len(text)),
    )
    down, still, up = found
    assert (still.margin, still.kl, still.kl_text) == (0, 0, 0)
    assert up.margin > 0 > down.margin
    assert down.preferred <= still.preferred <= up.preferred
    assert min(up.kl, down.kl, up.kl_text) > 0
    assert up.score == 6
    assert found.at(0.9) is up
    total = count = 0
    with torch.no_grad(), dial.live.use("dial", c=1.0):
        for text in texts:
            ids = torch.tensor(Letters()(text)["input_ids"])
            total += float(
                F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
            )
            count += len(ids) - 1
    assert up.nll == pytest.approx(total / count, rel=1e-4)
    assert found.nll_of == "2 other texts"
    json.dumps(found.to_dict(), allow_nan=False)


def test_repetition_is_counted_in_runs_of_four():
    assert repeated([[1, 2, 3, 4, 5]]) == 0
    assert repeated([[1] * 8]) == pytest.approx(4 / 5)
    assert repeated([[1, 2]]) == 0
