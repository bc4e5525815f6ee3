# SPDX-License-Identifier: Apache-2.0
"""Train a model under a recipe. Read from top to bottom: set up, step, look, save, end.

All randomness is a pure function of (seed, step, micro-batch, rank): initial weights, data order, dropout, stochastic
rounding. So a checkpoint holds weights, moments and counters, and a resumed run continues bit for bit on a CPU.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lowbits import models
from lowbits.analysis import measure_memory, native_gains
from lowbits.data import TokenData, check_vocabulary, prepare
from lowbits.errors import RunError
from lowbits.methods import Method
from lowbits.nn import Conversion, Execution, convert_, weights_quantized_once
from lowbits.optim import AdamW
from lowbits.train._batch import Batches, autocast
from lowbits.train._checkpoint import newest_intact, tidy, write_checkpoint
from lowbits.train._determinism import determinism
from lowbits.train._disk import write_json
from lowbits.train._display import Display
from lowbits.train._evaluate import evaluate, sample
from lowbits.train._folder import CHECKPOINTS, LOG, RESULT, begin, changed_environment, earlier_result
from lowbits.train._guard import Event, Source, find_source, judge
from lowbits.train._interrupts import Interrupts
from lowbits.train._log import Log, cut_after, open_trackers
from lowbits.train._memory import peak_bytes, reset_peak
from lowbits.train._monitor import Sample, errors_by_operand, first_nonfinite, layer_errors
from lowbits.train._run import Run
from lowbits.train._state import Progress, load_state_, save_state
from lowbits.train._world import World, unsynchronized, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Training:
    """All parts of a running training."""

    run: Run
    out: Path
    world: World
    config: dict[str, object]
    data: TokenData
    batches: Batches
    model: PreTrainedModel
    network: nn.Module  # the model, or DDP around it
    conversion: Conversion
    optimizer: AdamW
    peaks: list[float]  # learning rate of each group
    progress: Progress
    log: Log
    display: Display
    mark: tuple[int, float] = field(default=(0, 0.0))  # tokens and seconds at the last line of the log
    source: Source | None = None


def train(run: Run, out: str | Path, *, resume: bool = False) -> dict[str, object]:
    """Train a model as `run` says and leave everything in a folder.

    Args:
        run: what to do.
        out: the run's folder (docs/architecture.md, "Run directories").
        resume: go on with the run in `out` from its newest intact checkpoint, or start it if there is none.
    Returns:
        What result.json holds; a run that had come to its end is not run again.
    Raises:
        LowbitsError: the run cannot start or go on; the message says why and what to do.
    """
    out = Path(out)
    earlier = earlier_result(out, run.resolved(), resume)
    if earlier is not None:
        return earlier
    with world(run.compute.device) as here, determinism(run.compute.deterministic):
        try:
            t = _set_up(run, out, here)
            with closing(t.log), t.display, Interrupts() as interrupts:
                status = _loop(t, interrupts)
                return _finish(t, status, interrupts)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory on {here.device}; use a larger --accumulation, --gradient-checkpointing, or a smaller "
                "--batch-size."
            ) from error


def _set_up(run: Run, out: Path, here: World) -> _Training:
    """Check everything that can be wrong, then claim the folder, then load the checkpoint if there is one."""
    if run.batch_size % (run.accumulation * here.size):
        raise RunError(
            f"batch-size {run.batch_size} does not divide into {run.accumulation} micro-batches on {here.size} "
            "processes; choose a multiple."
        )
    data = _open_data(run, out, here)
    data.windows("val", run.block)  # both splits hold at least a block
    data.windows("train", run.block)
    model, conversion = _build(run, data, here)
    optimizer = AdamW(
        run.method.param_groups(model, run.optimizer.weight_decay),
        lr=run.optimizer.lr,
        betas=run.optimizer.betas,
        eps=run.optimizer.eps,
        seed=run.seed,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = Batches(run, data, model, here)
    batches.rehearse()
    config = {**run.resolved(), "data_fingerprint": data.fingerprint}
    if here.first:
        begin(out, config, here)
        tidy(out / CHECKPOINTS)
    here.barrier()
    display = Display(run.title, run.steps, quiet=not here.first)
    progress, events = _restore(run, out, here, model, optimizer, config)
    reset_peak(here.device)
    trackers = open_trackers(run.watching.sinks, out, config, progress.step) if here.first else []
    log = Log(out / LOG if here.first else Path(os.devnull), trackers)
    t = _Training(
        run, out, here, config, data, batches, model, here.wrap(model), conversion, optimizer, peaks, progress, log,
        display,
    )  # fmt: skip
    t.mark = (progress.tokens, progress.seconds)
    display.say(f"{run.title}: {conversion}")
    if run.rule.execution is not Execution.SIMULATED:
        events.append(Event("execution", f"the GEMMs under {run.recipe_name} run {run.rule.runs(here.device)}"))
        if here.device.type == "cuda":
            events += _slow_layers(t)
    for event in events:
        _report(t, event)
    return t


def _slow_layers(t: _Training) -> list[Event]:
    """Say which layers few bits make slower."""
    tokens = t.run.batch_size // (t.run.accumulation * t.world.size) * t.run.block
    with autocast(t.run, t.world):
        slow = {name: gain for name, gain in native_gains(t.model, tokens).items() if gain < 1}
    if not slow:
        return []
    patterns = sorted({f"*.{name.rpartition('.')[2]}" for name in slow})
    told = (
        f"{len(slow)} layers are slower natively than in high precision at {tokens} tokens, timed eagerly: "
        f"{min(slow.values()):.2f} to {max(slow.values()):.2f} times its speed, {next(iter(slow))} first. "
        f"Leave them with --keep.names {' '.join(patterns)}"
    )
    return [Event("slower", told)]


def _open_data(run: Run, out: Path, here: World) -> TokenData:
    """Open the folder of tokens; the packaged default is prepared beside the output, once."""
    if run.data != "stdlib":
        return TokenData.open(run.data)
    folder = out.parent / "stdlib-tokens"
    if here.first:
        prepare("stdlib", folder)
    here.barrier()
    return TokenData.open(folder)


def _build(run: Run, data: TokenData, here: World) -> tuple[PreTrainedModel, Conversion]:
    """Build, convert, place; conversion comes before compilation and DDP."""
    if callable(run.model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model = cast("PreTrainedModel", run.model(data.vocab_size, run.block)).train()
    else:
        model = models.build(run.model, data.vocab_size, run.block, run.seed, run.dropout)
    check_vocabulary(data, model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr, index]
    model.config.eos_token_id = data.eos_id
    choose = run.choose(model.get_output_embeddings())
    conversion = convert_(model, choose, keep=run.keep, seed=run.seed, verbose=False)
    if run.split_qkv and not any(name.endswith("c_attn") for name in conversion.converted):
        raise RunError(f"split-qkv: {run.model} has no fused c_attn layer to split; leave the option out.")
    run.method.prepare_(model, run.seed)
    model.to(here.device)  # type: ignore[arg-type]
    if here.device.type == "cpu":
        # torch's fused attention is the slower one there: a step of gpt2-pico at 128 tokens takes twice as long.
        model.set_attn_implementation("eager")
    if run.compute.gradient_checkpointing:
        # transformers 5.23 renamed it and warns of the old name.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if run.compute.compile:
        _compile_(model, here)
    return model, conversion


def _compile_(model: nn.Module, here: World) -> None:
    """Compile each block: they are alike, so one compilation serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if here.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise RunError("--compile needs a C++ compiler on the CPU and none was found; install g++ or leave it out.")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks or [model]:
        block.compile()


def _restore(
    run: Run, out: Path, here: World, model: PreTrainedModel, optimizer: AdamW, config: dict[str, object]
) -> tuple[Progress, list[Event]]:
    """Load the newest intact checkpoint and cut the log behind it; a fresh run has neither."""
    found = newest_intact(out / CHECKPOINTS) if here.first else (None, [])
    checkpoint, complaints = here.gather(found)[0]  # type: ignore[misc]
    progress = Progress() if checkpoint is None else load_state_(checkpoint, model, optimizer, config)
    events = [Event("fallback", f"{complaint} Falling back to an older one.") for complaint in complaints]
    if here.first and (cut_after(out / LOG, progress.step) or checkpoint is not None):
        changes = changed_environment(out, here)
        exact = f"not bit for bit: {changes}" if changes else "bit for bit" if here.device.type == "cpu" else "on CUDA"
        events.append(Event("resumed", f"resumed at step {progress.step} ({exact})"))
    return progress, events


def _loop(t: _Training, interrupts: Interrupts) -> str:
    """Train until the last step, a signal, or too many steps without a finite gradient; return the status."""
    run, watching, progress = t.run, t.run.watching, t.progress
    while progress.step < run.steps:
        started = time.perf_counter()
        sample = _due_sample(t)
        loss, grad_norm, stop = _step(t, interrupts, sample)
        progress.seconds += time.perf_counter() - started
        last = progress.step == run.steps
        for event in [*_begun(t, progress.step - 1), *judge(progress, loss, grad_norm)]:
            _report(t, _located(t, event))
        t.display.advance(progress.step, loss)
        if last or progress.step % watching.log_every == 0:
            _log_step(t, loss, grad_norm)
        if progress.streak >= watching.max_nonfinite:
            return _diverge(t)
        if last or progress.step % watching.eval_every == 0:
            progress.evaluation = evaluate(run, t.data, t.model, t.world)
            _write(t, "eval", tokens=progress.tokens, seconds=round(progress.seconds, 3), **progress.evaluation)
        if sample is not None:
            _log_errors(t, sample)
        if last or stop or progress.step % run.saving.save_every == 0:
            _save(t)
        if stop and not last:
            return "interrupted"
    return "finished"


def _begun(t: _Training, step: int) -> list[Event]:
    """The phase that begins with a step, told after it: a log cut behind a checkpoint then repeats no line."""
    if all(recipe.plain for recipe, _, _ in t.conversion.converted.values()):
        return []
    begun = [phase for phase in t.run.phases if phase.first_step(t.run.steps) == step]
    return [Event("phase", f"{phase.words}, from this step on") for phase in begun]


def _due_sample(t: _Training) -> Sample | None:
    """Return where to put the errors of the step that comes, if it is one that is measured."""
    every = t.run.watching.errors_every
    due = every and (t.progress.step + 1) % every == 0
    return Sample(t.model) if due else None


def _step(t: _Training, interrupts: Interrupts, sample: Sample | None) -> tuple[float, float, bool]:
    """Take one optimizer step, or skip it where loss or gradient is not finite; return loss, gradient norm, stop."""
    run, step = t.run, t.progress.step
    losses = []
    if sample is not None and run.compute.compile:  # another graph would round differently
        sample.measure_apart(lambda: t.batches.loss(t.model, step))
    # A method may change the weights before each forward pass.
    # On a GPU all weights at once take two launches, where one after the other they keep the host from running ahead.
    gains = run.accumulation > 1 or t.world.device.type == "cuda"
    with weights_quantized_once(t.model) if gains and type(run.method) is Method else nullcontext():
        for micro in range(run.accumulation):
            losses.append(_micro_step(t, micro, sample))
    # One reduction for what all processes must agree on, one transfer for what the host must know.
    mean = torch.stack(losses).mean()
    shared = torch.stack([mean, mean.new_tensor(float(interrupts.caught is not None))])
    parameters = [p for p in t.model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, run.optimizer.clip or math.inf)
    mean_loss, stop, grad_norm = torch.cat([t.world.mean(shared), norm.view(1)]).tolist()
    if math.isfinite(mean_loss) and math.isfinite(grad_norm):
        for group, peak in zip(t.optimizer.param_groups, t.peaks, strict=True):
            group["lr"] = peak * run.schedule.factor(step, run.steps)
        at = t.batches.at(step, run.accumulation - 1)
        run.method.before_update_(t.optimizer.param_groups, at)
        t.optimizer.step()
        run.method.after_step_(t.model, at)
    t.optimizer.zero_grad(set_to_none=True)
    t.progress.step += 1
    t.progress.tokens += run.tokens_per_step
    return mean_loss, grad_norm, stop > 0


def _micro_step(t: _Training, micro: int, sample: Sample | None) -> Tensor:
    """Run one micro-batch forward and backward; return its loss."""
    run = t.run
    with unsynchronized(t.network) if micro + 1 < run.accumulation else nullcontext():
        watched = sample is not None and micro == 0 and not run.compute.compile
        with sample.watching() if sample is not None and watched else nullcontext():
            loss = t.batches.loss(t.network, t.progress.step, micro)
        (loss / run.accumulation).backward()
    return loss.detach()


def _log_step(t: _Training, loss: float, grad_norm: float) -> None:
    progress, (tokens, seconds) = t.progress, t.mark
    speed = (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)
    t.mark = (progress.tokens, progress.seconds)
    memory = peak_bytes(t.world.device)
    progress.peak_bytes = max(progress.peak_bytes, memory)
    metrics = t.run.method.metrics(t.model)
    _write(
        t,
        "step",
        tokens=progress.tokens,
        seconds=round(progress.seconds, 3),
        loss=loss,
        lr=t.run.optimizer.lr * t.run.schedule.factor(progress.step - 1, t.run.steps),
        grad_norm=grad_norm,
        tokens_per_second=round(speed, 1),
        memory_bytes=memory,
        **({"method": metrics} if metrics else {}),
    )
    seconds_left = (t.run.steps - progress.step) * t.run.tokens_per_step / speed
    t.display.step(progress.step, loss, speed, memory, seconds_left)


def _log_errors(t: _Training, sample: Sample) -> None:
    """Write what the processes measured together; nothing where nothing was quantized."""
    found = errors_by_operand(t.world.gather(sample.transfer()))  # type: ignore[arg-type]
    event = first_nonfinite(found)
    if event is not None:
        _report(t, event)
    if found:
        _write(t, "errors", layers=layer_errors(t.model, found))


def _write(t: _Training, kind: str, **values: object) -> None:
    t.log.write({"kind": kind, "step": t.progress.step, **values})


def _report(t: _Training, event: Event) -> None:
    _write(t, "event", event=event.event, message=event.message, layer=event.layer, role=event.role)
    t.display.say(f"{t.run.title} step {t.progress.step}: {event.message}")


def _find_source(t: _Training) -> tuple[Source | None, str]:
    """Run the last batch again to find where it went wrong; the first process that sees it is believed."""
    seen: Source | None = None
    for micro in range(t.run.accumulation):
        seen = seen or find_source(t.model, lambda m=micro: t.batches.loss(t.model, t.progress.step - 1, m))
    source = next((s for s in t.world.gather(seen) if isinstance(s, Source)), None)
    where = f"first in the {source.role} of {source.layer}" if source else "the batch is finite when run again"
    return source, where


def _located(t: _Training, event: Event) -> Event:
    """Say where the numbers were lost, in the first of a row of skipped steps."""
    if event.event != "skipped" or t.progress.streak != 1:
        return event
    source, where = _find_source(t)
    layer, role = (source.layer, source.role) if source else ("", "")
    return Event(event.event, f"{event.message}; {where}", layer, role)


def _diverge(t: _Training) -> str:
    t.source, where = _find_source(t)
    layer, role = (t.source.layer, t.source.role) if t.source else ("", "")
    message = f"stopped after {t.progress.streak} non-finite steps in a row; {where}"
    _report(t, Event("diverged", message, layer, role))
    return "diverged"


def _save(t: _Training) -> None:
    """Write a checkpoint that `transformers` can load, tokenizer included."""
    if t.world.first:
        t.log.sync()

        def fill(folder: Path) -> None:
            save_state(folder, t.model, t.optimizer, t.progress, t.config)
            for name in t.data.index.tokenizer:
                shutil.copyfile(t.data.folder / name, folder / name)

        write_checkpoint(t.out / CHECKPOINTS, t.progress.step, fill, t.run.saving.keep)
    t.world.barrier()


def _finish(t: _Training, status: str, interrupts: Interrupts) -> dict[str, object]:
    """Measure what is measured once, write result.json and return what it holds."""
    run, progress = t.run, t.progress
    result: dict[str, object] = {
        "status": status,
        "recipe": run.recipe_name,
        "method": run.method.name,
        "seed": run.seed,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "val_loss_on": progress.evaluation.get("loss_on"),
        "val_loss_off": progress.evaluation.get("loss_off"),
        "train_loss": statistics.fmean(progress.recent) if progress.recent else None,
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "execution": run.rule.runs(t.world.device),
        "parameters": sum(p.numel() for p in t.model.parameters()),
        "converted_layers": len(t.conversion.converted),
        "linear_flops_share": t.conversion.flops_share,
        "skipped_steps": progress.skipped,
        "spikes": progress.spikes,
        "peak_memory_bytes": progress.peak_bytes,
        "memory": {},
        "sample": "",
        "tables": [],
        "diverged_at": progress.step if status == "diverged" else None,
        "diverged_layer": t.source.layer if t.source else None,
        "diverged_role": t.source.role if t.source else None,
    }
    if status == "finished" and t.world.first:
        with torch.compiler.set_stance("force_eager"):  # what compiled blocks save would escape the count
            memory = measure_memory(t.model, t.optimizer, t.batches.loss, progress.step - 1)
        result["memory"] = memory.as_json()
        result["sample"] = sample(run, t.data, t.model, t.world)
        with torch.compiler.set_stance("force_eager"):
            run.method.write(t.model, t.out)
        result["tables"] = [asdict(table) for table in run.method.tables(t.model)]
    if status == "interrupted" and interrupts.caught is not None:
        result["signal"] = interrupts.caught.name
        _report(
            t, Event("interrupted", f"{interrupts.caught.name}: saved at step {progress.step}, go on with --resume")
        )
    if t.world.first:
        write_json(t.out / RESULT, result)
    t.world.barrier()
    return result
