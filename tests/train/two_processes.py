"""Trains the same few steps in as many processes as there are; run by test_processes.py."""

import json
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorafold as lf

warnings.simplefilter("ignore")
NAMES = ("a", "b", "c")


def collate(features):
    ids = torch.tensor([f["input_ids"] for f in features])
    return {"input_ids": ids, "labels": ids.clone()}


def main(out, many, batch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes, **heads)).double()
    specs = {n: lf.LoRA(rank=2, seed=0, dtype=torch.float64) for n in (NAMES if many else "a")}
    live = lf.attach(model, specs)
    g = torch.Generator().manual_seed(1)
    # Rows in blocks, so that one process may have none of an adapter that the other has.
    order = "aabbaabbccaaccaabbccbbcc" if many else "a" * 24
    rows = [
        {"input_ids": torch.randint(1, 32, (8,), generator=g).tolist(), "adapter": name}
        for name in order
    ]
    if not many:
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    args = TrainingArguments(
        str(out / "run"),
        learning_rate=0.05,
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch,
        max_steps=6,
        logging_steps=1,
        save_strategy="steps",
        save_steps=6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.1,
        weight_decay=0.1,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    t = lf.train.Trainer(model, args, data_collator=collate, train_dataset=rows)
    t.train()
    if t.is_world_process_zero():
        losses = [row["loss"] for row in t.state.log_history if "loss" in row]
        (out / "losses.json").write_text(json.dumps([t.accelerator.num_processes, *losses]))
        found = {
            f"{n}.{i}": p.detach() for n in live.trained for i, p in enumerate(live.parameters(n))
        }
        save_file(found, out / "factors.safetensors")


if __name__ == "__main__":
    assert issubclass(lf.train.Trainer, Trainer)
    main(Path(sys.argv[1]), sys.argv[2] == "many", int(sys.argv[3]))
    if torch.distributed.is_initialized():  # its threads outlive the interpreter else
        torch.distributed.destroy_process_group()
