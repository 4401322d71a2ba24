"""What both trainers do beyond their library's: adapters alone on the disk, rows of many adapters.

The attached model is given to them as it is. A column `adapter` in the data says whose row each is.
Then every forward and backward runs within `live.use(rows)`, the loss is each adapter's own mean
over what one step of the optimiser sees (`many.py`), and gradients are clipped adapter by adapter.
Without that column all is as in the library, but for what is saved.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Live
from ..collection.folders import folder_names
from ..errors import FileError, MismatchError, RefusedError
from ..files.atomic import writing
from ..files.disk.sealed import read_sealed, with_seal
from ..files.replacing import exchange
from ..files.safetensors import save_tensors
from .checkpoints import check_sealed, drop_older, written
from .checks import check_model, check_parameters, check_running, trained_now
from .many import clip_by_adapter, numbers_of, sums_by_adapter, tokens_by_adapter
from .measured import Measured
from .orbital.controller import OrbitalController
from .packing import COLUMN, sequences
from .ranks import RandomRank

CONTROLLER, SEVERAL = "controller_state.safetensors", "adapters"
ROWS, LENGTHS = "lorafold_rows", "lorafold_lengths"  # what the collator adds to a batch


class AdapterTraining:
    """A mixin before a trainer of transformers; see `Trainer` for its options."""

    live: Live

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        lora_plus: float = 1.0,
        random_rank: RandomRank | None = None,
        controller: OrbitalController | None = None,
        **options: Any,
    ) -> None:
        self.live = handle_of(model)
        self._names = trained_now(self.live)
        self._lora_plus = _ratio(lora_plus)
        if random_rank is not None and controller is not None:
            raise MismatchError("random_rank= and controller= both choose the rank: give one")
        if controller is not None and len(self._names) > 1:
            raise MismatchError(
                f"controller= judges one adapter by the loss, and {len(self._names)} are trained "
                "here: train them one by one, or leave it out"
            )
        self._random_rank, self._controller, self._controlled = random_rank, controller, -1
        for key in ("train_dataset", "eval_dataset"):
            _check_column(options.get(key), self._names)
        with _not_purely_quantized(model):
            super().__init__(model, args, *more, **options)  # type: ignore[call-arg]
        own: Any = self
        if self._lora_plus != 1 and own.optimizer is not None:
            raise MismatchError(
                "lora_plus= is for the optimiser that the trainer makes, and optimizers= brings "
                "one: set the rates of its groups, or leave one of the two out"
            )
        own.data_collator = RowCollator(own.data_collator, self._names)
        self._measured = Measured(self.live)
        self._guard: Any = None
        count, wide = len(self._names), torch.float32
        self._counts = torch.ones(count, dtype=wide)  # tokens of each in this step of the optimiser
        self._tally = torch.zeros(2, count, dtype=wide, device=own.args.device)  # of an evaluation

    # Rows

    def _set_signature_columns_if_needed(self) -> None:
        own: Any = self
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if COLUMN not in own._signature_columns:
            own._signature_columns.append(COLUMN)

    @contextlib.contextmanager
    def _running(self, inputs: Mapping[str, Any], training: bool) -> Iterator[None]:
        """Run what the rows of a batch name, forward and backward."""
        own: Any = self
        what: Any = None
        rank, rows = None, inputs.get(ROWS)
        if training and self._random_rank is not None:
            rank, what = self._random_rank.at(own.state.global_step), self._random_rank.name
        if training and self._controller is not None:
            rank, what = self._controller.rank, self._controller.name
        if rows is None and rank is None:
            yield
            return
        if rows is not None:
            what = [self._names[i] for i in rows.tolist()]
        with self.live.use(what, rank=rank, lengths=inputs.get(LENGTHS)):
            yield

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *more: Any, **kw: Any) -> Any:
        """The library's, within `use` of what the rows name."""
        self._control(model, inputs)
        self._check_named(inputs)
        with self._running(inputs, True):
            return super().training_step(model, inputs, *more, **kw)  # type: ignore[misc]

    def _check_named(self, inputs: Mapping[str, Any]) -> None:
        """Refuse rows that don't say whose they are, where some trained adapters would get none."""
        chosen = self._random_rank is not None or self._controller is not None
        if ROWS not in inputs and not chosen:
            check_running(self.live, self._names)

    def _control(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Show a controller the loss of a step's first batch, at full rank."""
        own: Any = self
        if self._controller is None or self._controlled == own.state.global_step:
            return
        self._controlled = own.state.global_step
        given = own._prepare_inputs({k: v for k, v in inputs.items() if k not in (ROWS, LENGTHS)})
        with own.compute_loss_context_manager():
            self._controller.step(self._controller.read(lambda: model(**given)["loss"]))

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *more: Any, **kw: Any
    ) -> Any:
        """The library's, within `use` of what the rows name."""
        with self._running(inputs, False):
            return super().prediction_step(model, inputs, *more, **kw)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kw: Any) -> Any:
        """The library's; of many adapters the sum of each one's mean over all its tokens."""
        own: Any = self
        self._tally.zero_()
        found = super().evaluation_loop(*args, **kw)  # type: ignore[misc]
        sums, counts = own.accelerator.reduce(self._tally, "sum")
        all_of = zip(self._names, sums.tolist(), counts.tolist(), strict=True)
        means = {n: s / c for n, s, c in all_of if c}
        if means:
            key = f"{kw.get('metric_key_prefix', 'eval')}_loss"
            found.metrics.update({f"{key}/{name}": mean for name, mean in means.items()})
            found.metrics[key] = sum(means.values())
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kw: Any,
    ) -> Any:
        """The library's; of rows of many adapters the sum of each one's mean."""
        own: Any = self
        if ROWS not in inputs:
            own.loss_is_scaled_for_ga = None
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kw
            )
        if own.compute_loss_func is not None or own.label_smoother is not None:
            raise RefusedError(
                "compute_loss_func= and label_smoothing_factor= give one loss for all rows; with "
                "a column adapter each has its own: leave them out"
            )
        labels, rows, lengths = inputs["labels"], inputs[ROWS], inputs.get(LENGTHS)
        counts = num_items_in_batch
        if not isinstance(counts, Tensor) or counts.shape != (len(self._names),):
            counts = tokens_by_adapter(labels, rows, len(self._names), lengths)
        given = {k: v for k, v in inputs.items() if k not in (ROWS, LENGTHS, "labels")}
        outputs = model(**given)
        sums = sums_by_adapter(outputs["logits"], labels, rows, len(self._names), lengths)
        if not model.training:
            self._tally += torch.stack([sums.detach(), counts.to(sums)]).to(self._tally)
        loss = (sums / counts.to(sums).clamp_min(1)).sum()
        own.loss_is_scaled_for_ga = True
        loss = loss * own.accelerator.num_processes if model.training else loss
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        own: Any = self
        named = [ROWS in batch for batch in batch_samples]
        if not any(named):
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        if not all(named):
            raise MismatchError(f"of one step's batches, some have a column {COLUMN}, some none")
        counts = torch.zeros(len(self._names), dtype=torch.int64, device=device)
        for batch in batch_samples:
            labels, rows, lengths = batch["labels"].to(device), batch[ROWS], batch.get(LENGTHS)
            counts += tokens_by_adapter(labels, rows, len(self._names), lengths)
        self._counts = own.accelerator.reduce(counts, "sum")
        return self._counts

    # Steps

    def create_optimizer(self, model: Any = None) -> Any:
        """The library's, with the learning rate of B times `lora_plus`, and guarded."""
        own: Any = self
        check_parameters(self.live, self._names)
        if own.optimizer is None:
            super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
            if self._lora_plus != 1:
                _faster_b(own, self._lora_plus)
        if self._guard is None:
            # With several processes one may lack the rows of an adapter whose gradient it gets.
            alone = own.accelerator.num_processes == 1
            guard = self.live.guard if alone else self._resting
            self._guard = guard(own.optimizer)
        return own.optimizer

    def _resting(self, optimizer: torch.optim.Optimizer) -> Any:
        """Have adapters that no process has rows of make no step."""

        def before(*_: Any) -> None:
            for name, count in zip(self._names, self._counts.tolist(), strict=True):
                for p in self.live.parameters(name) if count == 0 else ():
                    p.grad = None

        return optimizer.register_step_pre_hook(before)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        own: Any = self
        if len(self._names) < 2:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        own.accelerator.unscale_gradients()
        return clip_by_adapter(self.live, own.args.max_grad_norm, self._names)

    def log(self, logs: dict[str, float], *more: Any, **kw: Any) -> None:
        """The library's, with the updates' sizes and how far they moved since the last time."""
        if any(key in logs for key in ("loss", "train_loss")):
            logs.update(self._measured())
        super().log(logs, *more, **kw)  # type: ignore[misc]

    # The disk

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        own: Any = self
        if not own.args.should_save:
            return

        def more(beside: Path) -> None:
            if self._controller is not None:
                write_controller(beside, self._controller)
            try:
                if own.processing_class is not None:
                    own.processing_class.save_pretrained(beside)
            except Exception as e:  # of tokenizers, whose writer raises nothing narrower
                raise FileError(f"{folder} can't be written: the tokenizer: {e}") from e
            arguments = io.BytesIO()
            torch.save(own.args, arguments)
            (beside / "training_args.bin").write_bytes(arguments.getvalue())

        folder = Path(own.args.output_dir if output_dir is None else output_dir)
        save_into(folder, self.live, self._names, more)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        own: Any = self
        run, limit = own._get_output_dir(trial=trial), own.args.save_total_limit
        with written(Path(run, f"checkpoint-{own.state.global_step}"), seals=own.args.should_save):
            own.args.save_total_limit = None  # none goes before the new one is whole
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                own.args.save_total_limit = limit
            own.accelerator.wait_for_everyone()
        if own.args.should_save:
            drop_older(Path(run), limit, own.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        check_sealed(Path(resume_from_checkpoint))
        resume_from(Path(resume_from_checkpoint), self.live, self._names)
        if self._controller is not None:
            resume_controller(Path(resume_from_checkpoint), self._controller)

    def _load_best_model(self) -> None:
        own: Any = self
        resume_from(Path(own.state.best_model_checkpoint), self.live, self._names)


class RowCollator:
    """A collator that turns the column `adapter` into the rows' numbers.

    Args:
        inner: the collator of all other columns. names: of the trained adapters.
    """

    def __init__(self, inner: Callable[[list[Any]], Any], names: list[str]) -> None:
        self.inner, self.names = inner, names

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "names"):  # not there yet: a pickle asks before it fills them
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, features: list[Any]) -> Any:
        """The batch, with `ROWS`, and `LENGTHS` where the rows lie end to end."""
        have = [COLUMN in feature for feature in features]
        if not any(have):
            return self.inner(features)
        if not all(have):
            raise MismatchError(
                f"some rows of the batch have a column {COLUMN}, and some have none"
            )
        owners, lengths = zip(*sequences(features), strict=True)
        rows = numbers_of(owners, self.names)
        batch = self.inner([{k: v for k, v in f.items() if k != COLUMN} for f in features])
        batch[ROWS] = rows
        if len(batch["input_ids"]) != len(features) or len(owners) != len(features):
            if len(batch["input_ids"]) != 1:
                raise MismatchError("the collator makes other rows than the data has")
            batch[LENGTHS] = list(lengths)
        return batch


def handle_of(model: Any) -> Live:
    """The handle of a model with adapters that are trained.

    Raises:
        MismatchError: nothing is attached to it, or nothing is trained.
    """
    if not isinstance(model, nn.Module):
        raise MismatchError(
            "give the model itself, with adapters attached: "
            f"lorafold.attach(model, lorafold.LoRA(…)); found a {type(model).__name__}"
        )
    live = Live.of(model)
    check_model(live, model)
    return live


def save_into(
    folder: Path,
    live: Live,
    names: list[str],
    more: Callable[[Path], None] = lambda beside: None,
) -> None:
    """Write trained adapters into a folder, one itself, several as `adapters/NAME`.

    All are written beside before the first file takes its place: a disk that is full leaves what
    was there.

    Args:
        more: writes other files into a folder that is given to it, which get there, too.

    Raises:
        FileError: they can't be written.
    """
    places = _places(names)
    with writing(folder), _staging(folder) as beside:
        more(beside)
        for name in names:
            live.save(beside / ".it", name)
            into = beside / places[name]
            into.mkdir(parents=True, exist_ok=True)
            for file in (beside / ".it").iterdir():
                os.replace(file, into / file.name)
            (beside / ".it").rmdir()
        files = sorted(p for p in beside.rglob("*") if not p.is_dir())
        exchange({file: folder / file.relative_to(beside) for file in files}, beside)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder in another to write in, of which nothing stays, nor of the other if it was new."""
    new = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        own: dict[str, Any] = {"prefix": ".beside-", "dir": folder, "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**own) as beside:
            yield Path(beside)
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def resume_from(folder: Path, live: Live, names: list[str]) -> None:
    """Load what `save_into` wrote."""
    for name, place in _places(names).items():
        live.resume(folder / place, name)


def save_controller(folder: Path, controller: OrbitalController) -> None:
    """Write a controller's state into a checkpoint.

    Raises:
        FileError: it can't be written.
    """
    with writing(folder), _staging(folder) as beside:
        write_controller(beside, controller)
        os.replace(beside / CONTROLLER, folder / CONTROLLER)


def write_controller(folder: Path, controller: OrbitalController) -> None:
    """Write a controller's state into a folder that nobody reads yet."""
    tensors = {k: t.contiguous().cpu() for k, t in controller.tensors().items()}
    header = {"lorafold": json.dumps(with_seal(controller.state_dict(), tensors))}
    save_tensors(tensors, folder / CONTROLLER, metadata=header)


def resume_controller(folder: Path, controller: OrbitalController) -> None:
    """Load what `save_controller` wrote.

    Raises:
        FileError: it is not there, or can't be read.
    """
    header, tensors = read_sealed(folder / CONTROLLER, "lorafold")
    controller.load_state_dict(header, tensors)


def _places(names: list[str]) -> dict[str, str]:
    """{name: folder within a checkpoint}; several stand apart from the library's files."""
    if len(names) == 1:
        return {names[0]: ""}
    return {name: f"{SEVERAL}/{folder}" for name, folder in folder_names(names).items()}


def _check_column(data: Any, names: list[str]) -> None:
    """Refuse names that nobody has, where the whole column can be asked."""
    for part in data.values() if isinstance(data, dict) else [data]:
        if COLUMN in (getattr(part, "column_names", None) or ()) and hasattr(part, "unique"):
            numbers_of(part.unique(COLUMN), names)


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise MismatchError(f"lora_plus must be a number above 0, found {value!r}")
    return float(value)


def _faster_b(trainer: Any, ratio: float) -> None:
    """LoRA+: the B sides step at `ratio` times the learning rate.

    Source: Hayou et al., LoRA+: efficient low rank adaptation of large models (2024),
    arXiv:2402.12354.
    """
    named = trainer.model.named_parameters()
    mine = {id(p) for n, p in named if n.endswith(".B") and ".lorafold." in n}
    for group in list(trainer.optimizer.param_groups):
        fast = [p for p in group["params"] if id(p) in mine]
        if fast:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            faster = {**group, "params": fast, "lr": ratio * group["lr"]}
            trainer.optimizer.add_param_group(faster)


@contextlib.contextmanager
def _not_purely_quantized(model: Any) -> Iterator[None]:
    """transformers refuses to train quantised models unless adapters are known to be there."""
    quantized = getattr(model, "is_quantized", False)
    known = getattr(model, "_hf_peft_config_loaded", False)
    if not quantized or known:
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = known
