"""What does a base in 4 or 8 bits save and cost, and does QLoRA on it run like PEFT's?

Four parts, on one thread of a CPU:

- The packaged base in every format and group size: how many times fewer bytes its linear layers
  take, bits a weight, errors of weights and logits, and the share of 8 packaged adapters' lift that
  is left on it, on average and at worst. They were trained on the float32 base, and lower the loss
  on held-out text; the share is (base − adapter) now over that in float32.
- A Llama of 2 layers, hidden size 1024, random weights, nf4 in groups of 64: our layers against
  those that transformers makes with bitsandbytes (same bytes, same logits), with the same adapter
  attached here and by PEFT there: processor time of a forward and of a step of training; losses
  alike. Both compute in float32: where a processor has AVX512-BF16, bitsandbytes would round
  scales and products to bfloat16 in evaluation, and not train any more afterwards; that is off.
- The same forward on the float32 base.
- Rows that are no whole number of groups, of unequal size: on processors with AVX-512,
  bitsandbytes' kernel takes other rows' scales. How far off its weights are from codes × scales,
  and what `quantize_base` does: a weight error like that of whole groups, or a refusal.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from _common import arguments, llama, report, table_of
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

import lorafold as lf
from lorafold.demo.model import data_dir
from lorafold.errors import MismatchError
from lorafold.layers.misread import misread
from lorafold.quantize.footprint import model_bytes
from lorafold.quantize.formats import chosen, quantized_linear

QUESTION = "A base in 4 and 8 bits: bytes, errors, lift kept; QLoRA against PEFT on bitsandbytes"
HIDDEN, LAYERS, VOCABULARY, RANK = 1024, 2, 1024, 16
FORMATS: dict[str, dict[str, Any]] = {
    "nf4, 32": {"group_size": 32},
    "nf4, 64": {},
    "nf4, 64, double": {"double_quant": True},
    "nf4, 128": {"group_size": 128},
    "fp4, 64": {"kind": "fp4"},
    "int8, rows": {"bits": 8},
    "int8 weights, 64": {"bits": 8, "kind": "int8_weight_only"},
}
ADAPTERS = ("roman", "morse", "dates", "add", "brackets", "caesar", "hexdump", "tokens")
CONTEXT, WINDOWS = 256, 12
EQUAL, NOT_SLOWER = 1e-4, 1.05
WIDTHS = ((128, 64), (96, 64), (384, 256), (192, 128), (100, 64), (66, 64), (33, 64))  # row, group

Rows = list[dict[str, Any]]


def packaged() -> Any:
    return AutoModelForCausalLM.from_pretrained(data_dir() / "base", dtype=torch.float32).eval()


def windows(name: str) -> torch.Tensor:
    """The held-out text of a task, (n, CONTEXT) bytes."""
    text = next((data_dir() / "heldout").glob(f"{name}.*")).read_bytes()
    count = min(len(text) // CONTEXT, WINDOWS)
    return torch.tensor(list(text[: count * CONTEXT])).view(count, CONTEXT)


def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def lifts(model: Any, adapters: dict[str, lf.Adapter]) -> dict[str, float]:
    """By how much each adapter lowers the loss on its own task."""
    live = lf.attach(model, adapters)
    found = {}
    for name in adapters:
        tokens = windows(name)
        before = float(loss(model, tokens))
        with live.use(name):
            found[name] = before - float(loss(model, tokens))
    live.detach()
    return found


@torch.no_grad()
def formats() -> tuple[Rows, dict[str, Any]]:
    """Every format on the packaged base."""
    model = packaged()
    adapters = {name: lf.load(data_dir() / "adapters" / name) for name in ADAPTERS}
    tokens = torch.cat([windows(name)[:4] for name in ADAPTERS])
    reference = lifts(model, adapters)
    rows, result = [], {}
    for label, options in FORMATS.items():
        quantized = copy.deepcopy(model)
        footprint = lf.quantize_base(quantized, **options, inputs=tokens)
        kept = {n: x / reference[n] for n, x in lifts(quantized, adapters).items()}
        numbers = {
            "÷ float32": footprint.ratio,
            "bits": 32 / footprint.ratio,
            "weights": footprint.weight_error,
            "logits": footprint.forward_error,
            "lift": sum(kept.values()) / len(kept),
            "worst": min(kept.values()),
        }
        rows.append({"format": label, **numbers})
        result[label] = numbers
    return rows, result


def widths() -> tuple[Rows, bool]:
    """Rows that groups divide and do not, and whether each was right or refused."""
    rows, right = [], True
    for width, size in WIDTHS:
        layer = torch.nn.Linear(width, 64)
        spread = torch.logspace(-1, 1, 64)[:, None]
        layer.weight.data = spread * torch.randn(
            64, width, generator=torch.Generator().manual_seed(0)
        )
        wrong = misread(quantized_linear(layer.weight, chosen(4, "nf4", size, False, None)))
        try:
            outcome: Any = lf.quantize_base(layer, group_size=size).weight_error
            right = right and not wrong and outcome < 0.2
        except MismatchError as e:
            outcome = "refused: " + str(e).rpartition(": ")[2]
            right = right and wrong > 0
        rows.append({"row": width, "group": size, "kernel off": wrong, "quantize_base": outcome})
    return rows, right


def by_transformers(
    model: Any, loader: Any = AutoModelForCausalLM, skip: Sequence[str] | None = None
) -> Any:
    """The same model, quantised by transformers with bitsandbytes, modules to skip aside."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=None if skip is None else list(skip),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = loader.from_pretrained(
            folder, dtype=torch.float32, quantization_config=config, device_map="cpu"
        )
    for module in found.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return found.eval()


def on_peft(base: Any, start: lf.Adapter) -> Any:
    """PEFT's adapter on a base in 4 bits, with factors of rank `RANK` to begin with."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sorted(start))
    theirs = peft.get_peft_model(base, config)
    layers = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {type(m).__name__ for m in layers.values()} == {"Linear4bit"}, layers
    assert len(layers) == len(start)
    with torch.no_grad():
        for path, u in start.items():
            layer = layers[f"base_model.model.{path}"]
            layer.lora_A["default"].weight.copy_(u.A)
            layer.lora_B["default"].weight.copy_(u.B)
    return theirs


def trainer(model: Any, parameters: Any, tokens: torch.Tensor) -> Callable[[], float]:
    """A function that makes one step of training and returns the loss before it."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        found = loss(model, tokens)
        found.backward()
        optimizer.step()
        return found.item()

    return step


def processor_seconds(
    fns: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Medians of processor time, in turn: on one thread, what else runs here hardly counts."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for k in range(warmup + repeats):
        for name in list(fns)[:: 1 if k % 2 else -1]:
            start = time.process_time()
            fns[name]()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[warmup:]) for name, values in times.items()}


def same(ours: float, theirs: float) -> float:
    difference = abs(ours - theirs)
    assert difference <= EQUAL, f"the outputs differ by {difference}"
    return difference


def peers(repeats: int) -> tuple[Rows, dict[str, Any]]:
    """Our base and adapter against transformers' base and PEFT's adapter."""
    floats = llama(HIDDEN, 2816, 16, LAYERS, VOCABULARY)
    model, base = copy.deepcopy(floats), by_transformers(floats)
    footprint = lf.quantize_base(model)
    live = lf.attach(model, lf.LoRA(rank=RANK, alpha=2 * RANK, seed=0))
    footprint = footprint.with_adapters(live)
    sizes = {"lorafold": footprint.after, "bitsandbytes": model_bytes(base)}
    assert sizes["lorafold"] == sizes["bitsandbytes"], sizes
    theirs = on_peft(base, live.adapter("default"))
    tokens = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))

    def logits(run: Any) -> Callable[[], torch.Tensor]:
        return lambda: run(tokens, use_cache=False).logits

    runs = {"float32, no adapter": floats, "lorafold": model, "PEFT on bitsandbytes": theirs}
    with torch.no_grad():
        difference = same(float((logits(model)() - logits(theirs)()).abs().max()), 0.0)
        forward = processor_seconds({k: logits(m) for k, m in runs.items()}, repeats)
    ours = trainer(model.train(), list(live.parameters()), tokens)
    trained = [p for p in theirs.train().parameters() if p.requires_grad]
    peer = trainer(theirs, trained, tokens)
    losses: dict[str, list[float]] = {"lorafold": [], "PEFT on bitsandbytes": []}
    steps = {
        "lorafold": lambda: losses["lorafold"].append(ours()),
        "PEFT on bitsandbytes": lambda: losses["PEFT on bitsandbytes"].append(peer()),
    }
    training = processor_seconds(steps, repeats)
    apart = max(same(a, b) for a, b in zip(*losses.values(), strict=True))
    rows = [
        {
            "run": label,
            "forward ms": 1e3 * forward[label],
            "training step ms": 1e3 * training[label] if label in training else "–",
        }
        for label in runs
    ]
    return rows, {
        "base bytes": footprint.after,
        "float32 bytes": footprint.before,
        "adapter bytes": footprint.adapters,
        "weight error": footprint.weight_error,
        "logits differ by": difference,
        "losses differ by": apart,
        "first and last loss": [losses["lorafold"][0], losses["lorafold"][-1]],
        "forward ms": {k: 1e3 * t for k, t in forward.items()},
        "training step ms": {k: 1e3 * t for k, t in training.items()},
        "training / PEFT": training["lorafold"] / training["PEFT on bitsandbytes"],
    }


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=15))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft|transformers")
    disable_progress_bar()
    kinds, by_format = formats()
    ragged, right = widths()
    rows, against = peers(args.repeats)
    first, last = against["first and last loss"]
    met = {
        "nf4 at least 7 × below float32": by_format["nf4, 64"]["÷ float32"] >= 7,
        "the loss falls": last < first,
        "rows that groups don't divide are right or refused": right,
        f"a training step at most {NOT_SLOWER} × PEFT's": against["training / PEFT"] <= NOT_SLOWER,
    }
    Console().print(table_of(kinds))
    Console().print(table_of(ragged))
    found = {"formats": by_format, "widths": ragged, "against PEFT": against, "met": met}
    report(QUESTION, rows, found, args.save)


if __name__ == "__main__":
    main()
