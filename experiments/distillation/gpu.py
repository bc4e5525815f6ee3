# SPDX-License-Identifier: Apache-2.0
"""`text-gpu`: a Llama of twelve layers teaches one of six on real text, through the library's own training loop.

Finished runs are not repeated. `--seeds` without a number trains the teacher alone; then each seed may be run by a
process of its own, side by side; the call that names all three writes the results.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.distillation import checks
from experiments.distillation.arms import BUCKETS, Plan, Result
from lowbits import models
from lowbits.analysis import device_name, provenance
from lowbits.data import TokenData
from lowbits.export import Coding, coded_sizes
from lowbits.methods import Method
from lowbits.methods.differentiable_quantization import DifferentiableQuantization
from lowbits.methods.distillation import Levels, QuantizedDistillation, coded_model, quantize_weights_
from lowbits.train import Compute, Device, Optimizer, Run, Saving, Watching, checkpoints, train

SIZE = ["llama-110m"]  # a list, so that a look at a small model can change it
PLAN = Plan(
    bits=(4, 2), qd=("64",), steps=600, teacher_steps=1200, dq_steps=100, lr=1e-3, teacher_lr=6e-4, temperature=1.0
)


@dataclass(frozen=True)
class Setting:
    """What a call says.

    Args:
        data: folder of `lowbits data prepare`.
        out: folder of the runs.
        device: cuda; cpu for a look.
        batch: sequences a step.
        block: tokens in a sequence.
        share: of the plan's steps; below 1 for a look.
    """

    data: str
    out: Path
    device: Device = Device.CUDA
    batch: int = 16
    block: int = 512
    share: float = 1.0

    def run(self, steps: int, lr: float, seed: int) -> Run:
        """Return an ordinary run."""
        steps = max(2, round(self.share * steps))
        return Run(
            data=self.data, steps=steps, batch_size=self.batch, block=self.block, seed=seed,
            optimizer=Optimizer(lr=lr), compute=Compute(device=self.device), saving=Saving(save_every=steps, keep=1),
            watching=Watching(log_every=50, eval_every=steps, eval_batches=8, errors_every=0),
        )  # fmt: skip


def half(vocab_size: int, block: int) -> nn.Module:
    """The teacher's architecture with half its layers."""
    from transformers import AutoModelForCausalLM

    config = models.config(SIZE[0], vocab_size, block)
    name = "num_hidden_layers" if hasattr(config, "num_hidden_layers") else "n_layer"
    setattr(config, name, getattr(config, name) // 2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def last(folder: Path) -> Path:
    return checkpoints(folder / "checkpoints")[-1]


def trained(run: Run, out: Path) -> Result:
    """Train, or read what was trained; score is the validation loss as deployed."""
    result = train(run, out, resume=True)
    return {"score": float(result["val_loss_on"]), "seconds": float(result["seconds"])}  # type: ignore[arg-type]


def taught(setting: Setting) -> Result:
    """The one teacher of all seeds."""
    run = setting.run(PLAN.teacher_steps, PLAN.teacher_lr, 1000)
    return trained(replace(run, model=SIZE[0]), setting.out / "teacher")


def seed_runs(setting: Setting, seed: int) -> dict[str, Result]:
    """All arms of a seed, under the names of the CPU experiments."""
    plan, out = PLAN, setting.out
    found = {"teacher": taught(setting)}
    base = replace(setting.run(plan.steps, plan.lr, seed), model=half)
    told = QuantizedDistillation(teacher=str(last(out / "teacher")), bits=32, size=64)

    def student(name: str, method: Method) -> None:
        found[name] = trained(replace(base, method=method), out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}")

    student("labels, 32 bits", Method())
    student("distilled, 32 bits", told)
    distilled = last(out / f"distilled-32_bits-{seed}")
    for bits in plan.bits:
        for name, buckets in BUCKETS.items():
            found[f"after training, {bits} bits, {name}"] = after_training(
                setting, distilled, Levels.of_bits(bits, buckets)
            )
        student(f"quantized distillation, {bits} bits, 64", replace(told, bits=bits))
        student(f"labels only, {bits} bits, 64", replace(told, bits=bits, teacher="none"))
        points = replace(setting.run(plan.dq_steps, plan.lr, seed), model=str(distilled))
        method = DifferentiableQuantization(bits=bits, size=64, point_lr=plan.dq_lr)
        name = f"learned points, {bits} bits, 64"
        found[name] = trained(replace(points, method=method), out / f"points-{bits}-{seed}")
    return found


def after_training(setting: Setting, folder: Path, levels: Levels) -> Result:
    """The validation loss of a trained model on levels, and its bytes."""
    device = torch.device(setting.device.value)
    model = models.build(str(folder), 0, setting.block, 0).to(device).eval()
    quantize_weights_(model, levels)
    data, total, count = TokenData.open(setting.data), 0.0, 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for ids in data.val_batches(setting.batch, setting.block, 8 * setting.batch):
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
            total, count = total + loss.item() * len(ids), count + len(ids)
    packed, huffman = (coded_sizes(coded_model(model), coding) for coding in (Coding.PACKED, Coding.HUFFMAN))
    sizes = {"packed_bytes": packed.file, "huffman_bytes": huffman.file, "ratio": huffman.ratio}
    return {"score": total / count, **sizes, "code_bits": huffman.mean_length, "entropy": huffman.entropy}


def speed(setting: Setting) -> dict[str, float]:
    """Tokens a second of greedy decoding in bf16, and the time of a step with and without levels."""
    device = torch.device(setting.device.value)
    folders = {"teacher": last(setting.out / "teacher"), "student": last(setting.out / "distilled-32_bits-0")}
    found = {f"decode tokens/s, {name}, bf16": decoding(setting, folder, device) for name, folder in folders.items()}
    for name, levels in {"32 bits": None, "4 bits": Levels.of_bits(4, BUCKETS["64"])}.items():
        found[f"step without optimizer, student, {name}, ms"] = stepping(setting, folders["student"], device, levels)
    return found


def decoding(setting: Setting, folder: Path, device: torch.device) -> float:
    model = models.build(str(folder), 0, setting.block, 0).to(device, torch.bfloat16).eval()
    prompt = torch.zeros(1, 16, dtype=torch.int64, device=device)
    count = min(128, setting.block - 16)
    new: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return count / median_seconds(device, lambda: model.generate(prompt, **new), 5)


def stepping(setting: Setting, folder: Path, device: torch.device, levels: Levels | None) -> float:
    model = models.build(str(folder), 0, setting.block, 0).to(device)
    if levels is not None:
        quantize_weights_(model, levels)
    ids = torch.zeros(setting.batch, setting.block, dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return 1e3 * median_seconds(device, step, 20)


def median_seconds(device: torch.device, work: Any, repeats: int) -> float:
    """Two warm-up calls, then the median."""
    seconds = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[2:])


def main(setting: Setting, seeds: list[int], results: Path = checks.RESULTS) -> Path | None:
    """Train what is not there; write the results once all three seeds are asked for."""
    runs: checks.Runs = {}
    print(f"text-gpu: teacher: {taught(setting)['score']:.4f}", flush=True)
    for seed in seeds:
        for name, result in seed_runs(setting, seed).items():
            print(f"text-gpu seed {seed}: {name}: {result['score']:.4f}", flush=True)
            runs.setdefault(name, []).append(result)
    if len(seeds) < 3:
        return None
    judged = checks.orderings(runs, PLAN, higher=False)
    c = checks.Comparison(runs, higher_is_better=False)
    near = c.advantage("quantized distillation, 4 bits, 64", "distilled, 32 bits")
    judged.append(
        checks.check("H200", "4-bit QD: perplexity at most 1.02 of the distilled", near, lambda x: x > -0.0198)
    )
    device = torch.device(setting.device.value)
    about = {"unit": "validation loss, nats", "higher_is_better": False, "plan": asdict(PLAN), "model": SIZE[0]}
    size = {"batch": setting.batch, "block": setting.block, "share": setting.share}
    whole = {"provenance": provenance(device), **about, **size, "runs": runs, "speed": speed(setting)}
    path = results / device_name(device) / "distillation_text_gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole | {"checks": [asdict(one) for one in judged]}, indent=1) + "\n", encoding="utf-8")
    for one in judged:
        print(f"{'holds ' if one.holds else 'FAILS '} {one.id:5} {one.statement}: {one.measured}, {one.seeds}")
    print(f"wrote {path}")
    return path
