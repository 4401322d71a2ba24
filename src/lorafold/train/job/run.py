"""One training run: files and a base in, an adapter with its card out.

TRL trains; this reads, checks, names, stops in good order, measures what was gained on the part
that was held out, and puts the result in its place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...attach import attach
from ...errors import MismatchError, RefusedError, UnknownNameError
from ...words import did_you_mean, some_of
from ..packing import COLUMN
from .base import Words, check_folder, read_model, read_words
from .card import card
from .data import Data, Row, counted, held_out, read_data, shared
from .folder import Folder, relative
from .libraries import Libraries, libraries, without_bars
from .measured import Gain, gains
from .recipe import SCHEDULES, Recipe
from .stopping import Interrupts, careful_trainer, watching

Progress = Callable[[int, int, str], None]
EVALUATIONS, LOGS, LONGEST = 10, 50, 1024


@dataclass(frozen=True)
class Stopped:
    """A run that Ctrl-C ended: after which step, and its checkpoint."""

    step: int
    checkpoint: str


@dataclass(frozen=True)
class _Parts:
    """What is trained on, and what is held out."""

    data: Data
    train: list[Row]
    held: list[Row]
    said: tuple[str, ...]
    digest: str  # of all files


def run(
    recipe: Recipe,
    *,
    folder: Path,
    base_model: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    told: Callable[[], None] | None = None,
) -> dict[str, Any] | Stopped:
    """Train as a recipe says, and write what comes out.

    Args:
        recipe: what to do. folder: of the base. base_model: what the adapter's config calls it;
            the recipe's word for it when None.
        resume: go on from the last checkpoint. overwrite: replace what is at the output.
        progress: called with (done, total, what). told: called when Ctrl-C has been heard.

    Returns:
        What training.json holds, and where the adapters are (`places`); or where it was stopped.

    Raises:
        FileError, MismatchError, UnknownNameError: data, base or output that can't be; naming it.
        DivergedError: the loss is no number any more. MissingExtraError: a library is not there.

    Not for: several processes, which a script of `lorafold.train.SFTTrainer` is for.
    """
    of, out, called = libraries(), Folder(recipe.output), base_model or recipe.base
    _check_alone()
    check_folder(folder)
    if not resume:
        files = [*recipe.data, *recipe.eval, recipe.chat_template or folder]
        out.check([folder, *files], overwrite)
    parts = _parts(recipe)
    folders = relative(parts.data.names or ("default",), bool(parts.data.names))
    if resume and out.recipe().get("digest") != parts.digest:
        raise MismatchError(
            "the data is not what the run was begun with: resume needs the same files; begin anew "
            "with overwrite=True"
        )
    progress = progress or (lambda done, total, what: None)
    with without_bars(of), Interrupts(told or (lambda: None)) as interrupts:
        progress(0, 0, "reading the base")
        with out.claimed():
            trainer, words = _trainer(recipe, folder, parts, out, of)
        _set_pace(trainer, recipe)
        trainer.add_callback(watching(of, interrupts, progress))
        begun = {"recipe": _lasting(recipe), "digest": parts.digest, "base_model": called}
        (out.tell if resume else out.begin)(begun)
        trainer.train(resume_from_checkpoint=str(out.last) if resume else None)
        if interrupts.asked and trainer.state.global_step < trainer.state.max_steps:
            return Stopped(trainer.state.global_step, str(out.last))
        progress(0, 0, "measuring")
        gained = gains(trainer, list(folders)) if parts.held else {}
    report = _report(recipe, called, parts, trainer, words, gained, folders)
    adapters = {name: trainer.live.adapter(name) for name in folders}
    named = {name: replace(a, base_model=report["base"]) for name, a in adapters.items()}
    cards = {name: card(name, report) for name in named}
    places = out.finish(named, cards, report, words.own, bool(parts.data.names))
    return {**report, "places": places}


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RefusedError(
            "this is for one process: for several, write a script of lorafold.train.SFTTrainer"
        )
    if torch.cuda.device_count() > 1:
        raise RefusedError(
            f"there are {torch.cuda.device_count()} GPUs, and this is for one: choose it with "
            "CUDA_VISIBLE_DEVICES=0 before the command"
        )


def _parts(recipe: Recipe) -> _Parts:
    """The data, read, checked and divided."""
    data = read_data(recipe.data, recipe.columns, recipe.lines)
    said = []
    if data.unused:
        said.append(f"columns that are not used: {some_of(data.unused)}")
    if not recipe.eval:
        train, held = held_out(data.rows, recipe.held_out, recipe.seed)
        if recipe.held_out and not held:
            said.append("nothing is held out: there are not two different rows")
        return _Parts(data, train, held, tuple(said), data.digest)
    other = read_data(recipe.eval, recipe.columns, recipe.lines)
    if (other.kind, bool(other.names)) != (data.kind, bool(data.names)):
        raise MismatchError(
            f"{some_of(recipe.eval)} and {some_of(recipe.data)} have different columns"
        )
    for name in other.names:
        if name not in data.names:
            raise UnknownNameError(
                f"{some_of(recipe.eval)}: the column {COLUMN} names {name!r}, which no row of the "
                f"data does; {did_you_mean(name, data.names)}"
            )
    twice = shared(data.rows, other.rows)
    if twice:
        said.append(f"{twice} of the {len(other.rows)} held-out rows are in the data, too")
    return _Parts(data, data.rows, other.rows, tuple(said), data.digest + other.digest)


def _trainer(
    recipe: Recipe, folder: Path, parts: _Parts, out: Folder, of: Libraries
) -> tuple[Any, Words]:
    """TRL's trainer with the base, the fresh adapters and the data."""
    bf16 = recipe.bf16
    if bf16 is None:
        bf16 = not recipe.cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    chats = parts.data.kind != "text" and any(
        not isinstance(row.get("prompt", []), str) for row in parts.train
    )
    words = read_words(folder, recipe, parts.data.kind, chats, of)
    model = read_model(folder, recipe, bf16, of)
    attach(model, {n: recipe.spec() for n in parts.data.names} or recipe.spec())
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    length = recipe.max_length or min(context, LONGEST)
    if length > context:
        raise MismatchError(f"max_length={length} is above the {context} tokens of the base")
    args = of.trl.SFTConfig(str(out.checkpoints), **_arguments(recipe, parts, words, bf16, length))
    callbacks = []
    if parts.held and recipe.patience:
        callbacks.append(of.transformers.EarlyStoppingCallback(recipe.patience))
    dataset = of.datasets.Dataset.from_list
    try:
        trainer = careful_trainer()(
            model,
            args,
            train_dataset=dataset(parts.train),
            eval_dataset=dataset(parts.held) if parts.held else None,
            processing_class=words.tokenizer,
            callbacks=callbacks,
            lora_plus=recipe.lora_plus,
        )
    except ValueError as e:
        if "chat template" in str(e).lower() or "apply_chat_template" in str(e):
            raise MismatchError(f"the chat template can't be used for training: {e}") from e
        raise
    trainer.remove_callback(of.transformers.PrinterCallback)
    for what, rows in (("", trainer.train_dataset), ("held-out ", trainer.eval_dataset)):
        if rows is not None and not len(rows):
            raise MismatchError(
                f"no {what}row has a token to be learned within max_length={length}: raise it"
            )
    return trainer, words


def _arguments(
    recipe: Recipe, parts: _Parts, words: Words, bf16: bool, length: int
) -> dict[str, Any]:
    """What TRL calls them."""
    when = "steps" if parts.held else "no"
    cuda = torch.cuda.is_available() and not recipe.cpu
    return {
        "num_train_epochs": recipe.epochs,
        "max_steps": recipe.steps or -1,
        "per_device_train_batch_size": recipe.batch,
        "per_device_eval_batch_size": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulate,
        "learning_rate": recipe.lr,
        "lr_scheduler_type": SCHEDULES[recipe.schedule],
        "warmup_steps": recipe.warmup,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "max_length": length,
        "packing": recipe.packing,
        "completion_only_loss": False if recipe.train_on_prompts else None,
        "assistant_only_loss": words.marks and not recipe.train_on_prompts,
        "bf16": bf16,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": recipe.seed,
        "use_cpu": recipe.cpu,
        "eval_strategy": when,
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": bool(parts.held),
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
    }


def _set_pace(trainer: Any, recipe: Recipe) -> None:
    """How often it evaluates, saves and logs, now that the number of steps is known."""
    args = trainer.args
    batches = math.ceil(len(trainer.train_dataset) / recipe.batch)
    total = recipe.steps or math.ceil(recipe.epochs * math.ceil(batches / recipe.accumulate))
    args.eval_steps = args.save_steps = recipe.eval_every or max(1, total // EVALUATIONS)
    args.logging_steps = max(1, total // LOGS)


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """The recipe with paths that hold in any directory."""

    def whole(path: str) -> str:
        return os.path.abspath(path)

    files = {"data": [whole(p) for p in recipe.data], "eval": [whole(p) for p in recipe.eval]}
    template = recipe.chat_template and whole(recipe.chat_template)
    base = whole(recipe.base) if os.path.exists(recipe.base) else recipe.base
    return {**recipe.to_dict(), **files, "chat_template": template, "base": base}


# The report


def _report(
    recipe: Recipe,
    base: str,
    parts: _Parts,
    trainer: Any,
    words: Words,
    gained: Mapping[str, Gain],
    folders: Mapping[str, str],
) -> dict[str, Any]:
    """What training.json says, in JSON's types."""
    state, fits = trainer.state, trainer.fits
    rows = counted(parts.train)
    best = state.best_model_checkpoint
    return {
        "lorafold": __version__,
        "base": base,
        "adapters": {
            name: {
                "folder": place,
                "rows": rows.get(name, len(parts.train)),
                "rank": trainer.live.adapter(name).rank,
                "norm": trainer.live.adapter(name).norm(),
                "held_out": _gain(gained.get(name)),
            }
            for name, place in folders.items()
        },
        "data": {
            "kind": parts.data.kind,
            "digest": parts.data.digest,
            "files": [asdict(f) for f in parts.data.files],
            "train": len(parts.train),
            "held_out": len(parts.held),
            "tokens": fits["train"].tokens,
            "cut": {part: fit.cut for part, fit in fits.items()},
            "dropped": {part: fit.dropped for part, fit in fits.items()},
        },
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_step": int(Path(best).name.rpartition("-")[2]) if best else None,
        "ended": "whole" if state.global_step >= state.max_steps else "early",
        "losses": _losses(state.log_history),
        "max_length": trainer.args.max_length,
        "options": _shown(recipe),
        "said": [*words.said, *parts.said],
    }


def _gain(found: Gain | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "lift": found.lift}


def _losses(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps with their loss, and the held-out part's where it was asked."""
    found: dict[int, dict[str, Any]] = {}
    for entry in history:
        for key, name in (("loss", "loss"), ("eval_loss", "held_out")):
            if key in entry:
                found.setdefault(entry["step"], {"step": entry["step"]})[name] = entry[key]
    return list(found.values())


def _shown(recipe: Recipe) -> dict[str, Any]:
    """The options, without where files lie."""
    hidden = ("base", "data", "eval", "output", "chat_template")
    given = {
        k: v for k, v in recipe.to_dict().items() if k not in hidden and v not in (None, (), {})
    }
    return {**given, "alpha": recipe.spec().alpha}


def resumed(output: str) -> tuple[Recipe, str | None]:
    """The recipe of the run at an output, and what its base is called.

    Raises:
        FileError: there is none that can be gone on with.
    """
    found = Folder(output).recipe()
    given = {**found["recipe"], "output": output}
    return Recipe.of(given), found.get("base_model")
