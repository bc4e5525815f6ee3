# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and docs/ from the code and from results files: `python docs/generate.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`. A test fails when a page
is stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import runpy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from lowbits import formats, methods, models, optim, recipes
from lowbits.cli.analyze import ANALYSES
from lowbits.errors import RunError
from lowbits.formats import FloatFormat, Format
from lowbits.quantizers import QuantSpec

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> str:
    """Return a Markdown table; `align` holds for all columns but the first."""
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Return a number as short as it can be said, powers of two far from 1 as such."""
    exponent = math.log2(abs(value)) if value else 0.0
    if exponent.is_integer() and not -4 <= exponent <= 12:
        return f"{'-' if value < 0 else ''}2^{int(exponent)}"
    return f"{value:.6g}"


def format_overview() -> str:
    """One row a format: what `lowbits formats` prints."""
    return table(
        [
            "format",
            "bits",
            "codes",
            "values",
            "lowest",
            "largest",
            "smallest normal",
            "smallest > 0",
            "zero",
            "not numbers",
        ],
        (
            [
                f"`{fmt.name}`",
                str(fmt.bits),
                str(1 << fmt.bits),
                str(len(fmt.values())),
                number(fmt.min),
                number(fmt.max),
                number(2.0**fmt.min_normal_exponent) if isinstance(fmt, FloatFormat) else "",
                number(fmt.smallest),
                "yes" if fmt.has_zero else "no",
                not_numbers(fmt),
            ]
            for fmt in formats.ALL
        ),
        align="---:",
    )


def not_numbers(fmt: Format) -> str:
    """Count the codes that stand for NaN or an infinity."""
    nan = sum(math.isnan(value) for value in fmt.code_values)
    inf = sum(math.isinf(value) for value in fmt.code_values)
    return ", ".join(f"{count} {name}" for count, name in ((inf, "inf"), (nan, "NaN")) if count) or "none"


def format_values() -> str:
    """Every value of the formats of at most 4 bits."""
    return table(
        ["format", "values"],
        (
            [f"`{fmt.name}`", " ".join(number(value) for value in fmt.values().tolist())]
            for fmt in formats.ALL
            if fmt.bits <= 4
        ),
    )


def recipe_table(family: str) -> str:
    """Every named recipe of one family: the operands of its three GEMMs, its moments, what hardware could run.

    Columns in which no recipe says anything are left out.
    """
    header = [
        "recipe",
        "fprop x",
        "fprop w",
        "dgrad g",
        "dgrad w",
        "wgrad g",
        "wgrad x",
        "m",
        "v",
        "could run natively",
    ]
    rows = [
        [
            f"`{name}`",
            *(words(spec) for gemm in recipe.gemms.values() for spec in gemm),
            words(recipe.first_moment),
            words(recipe.second_moment),
            ", ".join(gemm for gemm in recipe.gemms if recipe.illegal(gemm) is None),
        ]
        for name, recipe in recipes.FAMILIES[family].items()
    ]
    used = [any(column) for column in zip(*rows, strict=True)]
    return table(list(compress(header, used)), [list(compress(row, used)) for row in rows])


def words(spec: QuantSpec | None) -> str:
    """Return a quantizer in words, nothing for what stays in high precision."""
    return str(spec) if spec else ""


def all_methods() -> str:
    """Every method and what it does."""
    rows = []
    for name in methods.names():
        try:
            kind = type(methods.named(name))
        except RunError:  # a module of functions, none of which is a method of the loop
            continue
        fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))
        rows.append([f"`{name}`", (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " "), fields])
    return table(["method", "what it does", "its options"], rows)


def optimizers() -> str:
    """Every optimizer, its constructors with fewer bits, and the bytes of state that each keeps for a parameter."""
    kinds = [kind for _, kind in inspect.getmembers(optim, inspect.isclass) if hasattr(kind, "rule")]
    few = {name: make for name, make in inspect.getmembers(optim, inspect.isfunction) if re.search("bit$|Fp8$", name)}
    rows = []
    for kind in kinds:
        own = [n for n, make in few.items() if inspect.signature(make).return_annotation == kind.__name__]
        bytes_each = [f"`{name}` {state_bytes(few[name]):.4g}" for name in own]
        same = f"`torch.optim.{kind.__name__}`" if hasattr(torch.optim, kind.__name__) else ""
        moments = ", ".join(f"`{moment}`{'' if signed else ' >= 0'}" for moment, signed in kind.rule.moments.items())
        rows.append([f"`{kind.__name__}`", same, moments, f"{state_bytes(kind):.4g}", "<br>".join(bytes_each)])
    header = ["optimizer", "the same as", "moments", "bytes a parameter in float32", "constructors, bytes a parameter"]
    return table(header, rows)


def state_bytes(make: Callable[..., optim.CodecOptimizer]) -> float:
    """Bytes of state, as its storages have them, over the elements of a square parameter; with momentum."""
    parameter = torch.nn.Parameter(torch.ones(512, 512))
    known = inspect.signature(make).parameters
    optimizer = make(
        [parameter], **{k: v for k, v in {"lr": 1e-3, "momentum": 0.9, "beta1": 0.9}.items() if k in known}
    )
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    stored = [t.untyped_storage().nbytes() for name, t in optimizer.state[parameter].items() if name != "step"]
    return sum(stored) / parameter.numel()


def sizes() -> str:
    """Every named model size, and who published its shape."""
    rows = (
        [
            f"`{name}`",
            size.family,
            *(str(size.shape.get(a, size.shape.get(b))) for a, b in SHAPES.values()),
            size.source,
        ]
        for name, size in models.SIZES.items()
    )
    return table(["model", "family", *SHAPES, "shape of"], rows)


def analyses() -> str:
    """Every analysis and the question that it answers."""
    rows = ([f"`{name}`", inspect.getdoc(kind).split("\n")[0]] for name, kind in ANALYSES.items())
    return table(["`lowbits analyze ...`", "the question"], rows)


def results() -> str:
    """The comparison that `make demo` makes, as its report.json was committed; nothing while there is none."""
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu*/demo.json"))
    if not files:
        return ""
    report = json.loads(files[0].read_text(encoding="utf-8"))
    rows = (
        [f"`{arm['name']}`", arm["quantizes"], spread(arm["loss_on"]), gap(arm["gap"]), arm["words"]]
        for arm in report["arms"]
    )
    header = ["recipe", "quantizes", "validation loss, nats", "gap", "verdict"]
    facts = dict(report["environment"])
    path = files[0].relative_to(ROOT).as_posix()
    made = f"Made by `make demo` at commit {facts['commit']}, torch {facts['torch']}; file: `{path}`."
    return f"{table(header, rows)}\n{report['noise_words']} {made}\n"


def experiment(scale: str) -> dict[str, Any]:
    """The results file of experiments/linear_quantization.py at one scale."""
    (path,) = (ROOT / "benchmarks" / "results").glob(f"*/linear_quantization_{scale}.json")
    return {**json.loads(path.read_text(encoding="utf-8")), "path": path.relative_to(ROOT).as_posix()}


def checks(scale: str) -> str:
    """Every claim that was checked, what was measured, and whether it holds."""
    found = experiment(scale)
    rows = ([c["id"], c["statement"], c["measured"], "yes" if c["holds"] else "**no**"] for c in found["checks"])
    return f"{table(['check', 'claim', 'measured, gaps in nats', 'holds'], rows)}\n{made_by(found)}\n"


def gaps(scale: str) -> str:
    """Every arm: its validation losses by seed and its gap to all baseline runs."""
    found = experiment(scale)
    rows = (
        [f"`{name}`", " ".join(f"{loss:.4f}" for loss in losses), f"{found['gaps'][name]:+.4f}"]
        for name, losses in sorted(found["losses"].items(), key=lambda item: found["gaps"].get(item[0], math.inf))
        if losses
    )
    return table(["arm", "validation loss by seed, quantizers on", "gap, nats"], rows)


def steps() -> str:
    """Every arm of benchmarks/linear_recipes.py on the H200: time of a step, and its ratio to bf16's."""
    path = ROOT / "benchmarks" / "results" / "nvidia-h200" / "linear_recipes.json"
    found = json.loads(path.read_text(encoding="utf-8"))["steps"]
    rows = []
    for name in dict.fromkeys(key.rpartition(", ")[0] for key in found):
        eager, compiled = (found.get(f"{name}, {how}") for how in ("eager", "compiled"))
        rows.append([name, (eager or compiled)["execution"], *timed(eager), *timed(compiled)])
    return table(["arm", "execution", "eager, ms", "over bf16", "compiled, ms", "over bf16"], rows)


def timed(step: dict[str, Any] | None) -> tuple[str, str]:
    """Return time and ratio of a step, dashes for one that was not measured."""
    return (f"{step['ms']:.1f}", f"{step['time_over_bf16']:.2f}") if step else ("-", "-")


def made_by(found: dict[str, Any]) -> str:
    """Where a results file comes from."""
    told, run = found["provenance"], found["run"]
    return (
        f"{told['device']}, torch {told['versions']['torch']}; {run['model']}, {run['steps']} steps of "
        f"{run['batch_size'] * run['block']:,} tokens. Baseline {found['baseline']:.4f}, standard deviation"
        f" of its runs "
        f'{found["sigma"]:.4f}; "no gap" means within {found["close"]:.4f}. File: `{found["path"]}`.'
    )


EIGHTBIT = {"lm_cpu": "LM, CPU", "states": "errors", "image_cpu": "images", "text_cpu": "text", "lm_gpu": "LM, H200",
            "memory_check": "memory, H200"}  # fmt: skip


def eightbit(name: str) -> dict[str, Any] | None:
    """A results file of experiments/eightbit_optimizers; None while there is none."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/eightbit_{name}.json"))
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def eightbit_checks() -> str:
    """Every claim of the 8-bit experiments that was checked."""
    rows = [
        [where, c["id"], c["statement"], c["measured"], "yes" if c["holds"] else "**no**"]
        for name, where in EIGHTBIT.items()
        for c in (eightbit(name) or {"checks": []})["checks"]
    ]
    return table(["where", "check", "claim", "measured", "holds"], rows)


def eightbit_lm() -> str:
    """The small language model: losses by seed, the mean distance from 32 bits, bytes of state."""
    found = eightbit("lm_cpu")
    if found is None:
        return ""
    rows = []
    for name, results in found["runs"].items():
        losses = " ".join(f"{r['loss']:#.5g}" if math.isfinite(r["loss"]) else "-" for r in results)
        distance = found["gaps"][name]
        shown = f"{distance:+.4f}" if abs(distance) < 10 else f"{distance:+.0f}"
        rows.append([f"`{name}`", losses, shown, f"{results[0]['state_bytes']:.3f}"])
    made = found["setting"]
    words = (
        f"{made['parameters']:,} parameters, {made['steps']} steps of {made['tokens_a_step']} tokens, betas "
        f"{tuple(made['betas'])}; standard deviation of the 32-bit runs {made['spread']:.4f}. {origin('lm_cpu')}"
    )
    header = ["arm", "validation loss by seed", "mean gap to 32-bit, same seed", "state bytes a parameter"]
    return f"{table(header, rows)}\n{words}\n"


def eightbit_classifiers() -> str:
    """Image and text classifier: accuracy by seed."""
    rows = [
        [f"{made['data']}; {made['model']}, {made['optimizer']}", f"`{arm}`",
         " ".join(f"{r['accuracy']:.2f}" for r in results), mean_and_deviation([r["accuracy"] for r in results]),
         " ".join(f"{r['loss']:.4f}" for r in results), f"{results[0]['state_bytes']:.3f}"]
        for found in (eightbit("image_cpu"), eightbit("text_cpu")) if found
        for made in [found["setting"]] for arm, results in found["runs"].items()
    ]  # fmt: skip
    header = ["task", "moments", "accuracy by seed, %", "mean", "loss by seed", "state bytes a parameter"]
    return table(header, rows)


def eightbit_errors() -> str:
    """What is left of Adam's update after its moments were stored."""
    found = eightbit("states")
    if found is None:
        return ""
    keys = ["mean", "median", "mean_relative", "median_relative", "above_one"]
    rows = ([name, *(f"{row[key]:.2g}" for key in keys)] for name, row in found["errors"].items())
    header = ["stored as, elements a scale", "mean", "median", "mean relative", "median relative", "share above 1"]
    about = f"{found['moments']['elements']:,} elements, mean of u {found['moments']['mean_update']:.3f}. "
    return f"{table(header, rows, '---:')}\n{about}{origin('states')}\n"


def eightbit_drift() -> str:
    """How far the parameters go astray under gradients of very different scales."""
    found = eightbit("states")
    if found is None:
        return ""
    sigmas = list(found["drift"])
    rows = (
        [name, *(f"{d[name]['drift']:.4f} ({d[name]['largest']:,.1f})" for d in found["drift"].values())]
        for name in found["drift"][sigmas[0]]
    )
    return table(["moments in blocks of 256", *(f"sigma {sigma}" for sigma in sigmas)], rows, "---:")


def eightbit_memory(checkpointed: bool) -> str:
    """The largest model by family, memory and setup, as the ledger predicts."""
    found = eightbit("memory")
    if found is None:
        return ""
    rows = [row for row in found["rows"] if row["checkpointed"] is checkpointed]
    setups = list(dict.fromkeys(row["setup"] for row in rows))
    cells = {(row["family"], row["gib"], row["setup"]): row for row in rows}
    body = (
        [f"{family}, {gib} GiB", *(model_size(cells[family, gib, setup]) for setup in setups)]
        for family, gib in dict.fromkeys((row["family"], row["gib"]) for row in rows)
    )
    return table(["memory", *setups], body, "---:")


def eightbit_memory_check() -> str:
    """Predicted and measured peaks."""
    found = eightbit("memory_check")
    if found is None:
        return "Not measured yet.\n"
    rows = (
        [c["size"], c["setup"], "yes" if c["checkpointed"] else "no", *(f"{c[k] / 2**30:.2f}" for k in PEAKS),
         f"{c['error']:+.1%}", f"{c['states'] / c['parameters']:.3f}"]
        for c in found["cells"]
    )  # fmt: skip
    header = ["model", "setup", "checkpointing", "predicted, GiB", "measured, GiB", "error", "state bytes a parameter"]
    return f"{table(header, rows, '---:')}\n{origin('memory_check')}\n"


def eightbit_gpu() -> str:
    """GPT-2 small: losses by seed."""
    found = eightbit("lm_gpu")
    if found is None:
        return "Not measured yet.\n"
    base = mean(found["losses"]["bf16"])
    rows = (
        [f"`{name}`", " ".join(f"{loss:.4f}" for loss in losses), f"{mean(losses) - base:+.4f}" if losses else "-",
         found["status"][name]]
        for name, losses in found["losses"].items()
    )  # fmt: skip
    return f"{table(['recipe', 'validation loss by seed', 'gap, nats', 'status'], rows)}\n{origin('lm_gpu')}\n"


PEAKS = ("predicted", "measured")


def origin(name: str) -> str:
    """Where a results file of the 8-bit experiments comes from."""
    (path,) = (ROOT / "benchmarks" / "results").glob(f"*/eightbit_{name}.json")
    told = json.loads(path.read_text(encoding="utf-8"))["provenance"]
    return f"{told['device']}, torch {told['versions']['torch']}; file: `{path.relative_to(ROOT).as_posix()}`."


DISTILLED = ["digits", "images", "text", "translation", "text_gpu", "images_gpu"]


def distillation(task: str) -> dict[str, Any] | None:
    """A results file of experiments/distillation; None while there is none."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*/distillation_{task}.json"))
    return {**json.loads(files[0].read_text(encoding="utf-8")), "path": files[0]} if files else None


def distillation_checks() -> str:
    """Every ordering that was checked, on every task."""
    rows = [
        [task.replace("_gpu", ", H200"), c["id"], c["statement"], c["measured"], c["seeds"],
         "yes" if c["holds"] else "**no**"]
        for task in DISTILLED for c in (distillation(task) or {"checks": []})["checks"]
    ]  # fmt: skip
    return table(["task", "check", "claim", "advantage: mean (by seed)", "seeds", "holds"], rows)


def distillation_arms(task: str) -> str:
    """Every arm of a task by seed."""
    found = distillation(task)
    if found is None:
        return "Not measured yet.\n"
    digits = 2 if found["higher_is_better"] else 4
    rows = []
    for name, results in found["runs"].items():
        scores = [result["score"] for result in results]
        shown = " ".join(f"{score:.{digits}f}" for score in scores)
        deviation = f" ± {stdev(scores):.{digits}f}" if len(scores) > 1 else ""
        rows.append([name, shown, f"{mean(scores):.{digits}f}{deviation}"])
    told, path = found["provenance"], found["path"].relative_to(ROOT).as_posix()
    words = f"{told['device']}, torch {told['versions']['torch']}; file: `{path}`."
    return f"{table(['arm', found['unit'] + ', by seed', 'mean'], rows)}\n{words}\n"


def distillation_sizes() -> str:
    """Bytes of the 4-bit and 2-bit students: files as written, and the published formula."""
    rows = []
    for task in DISTILLED:
        for name, results in (distillation(task) or {"runs": {}})["runs"].items():
            one = results[0]
            if name.startswith("quantized distillation, ") and "stochastic" not in name and "packed_bytes" in one:
                sizes = [f"{one[key]:,.0f}" for key in ("packed_bytes", "huffman_bytes", "published_bytes")]
                bits = [f"{one['code_bits']:.3f}", f"{one['entropy']:.3f}", f"{one['ratio']:.2f}"]
                rows.append([f"{task}, {name.removeprefix('quantized distillation, ')}", *sizes, *bits])
    header = ["student, seed 0", "packed file, bytes", "Huffman file, bytes", "published formula, bytes",
              "Huffman bits a code", "entropy", "times smaller"]  # fmt: skip
    return table(header, rows, "---:")


def distillation_speed() -> str:
    """Decoding and steps on the GPU."""
    found = distillation("text_gpu")
    if not (found and found["once"]):
        return "Not measured yet.\n"
    return table(["measured", ""], [[name, f"{value:.4g}"] for name, value in found["once"].items()], "---:")


def model_size(row: dict[str, Any]) -> str:
    """Return parameters, depth and width of a model, or that there is none."""
    return f"{row['parameters'] / 1e9:.2f} B ({row['layers']} x {row['width']})" if "parameters" in row else "-"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def spread(value: dict[str, Any]) -> str:
    """Return `mean ± standard deviation`."""
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.4f}" + (f" ± {value['spread']:.4f}" if value["spread"] is not None else "")


def gap(value: dict[str, Any] | None) -> str:
    """Return the distance from the baseline in nats."""
    return f"{value['nats']:+.4f}" if value else "-"


def tree() -> str:
    """The packages with a line each, as docs/architecture.md has them."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = [re.sub(r" +\([\w, ]+\)$", "", line) for line in page.split("```")[1].strip().splitlines()]
    return "```\n" + "\n".join(lines) + "\n```\n"


# What the configs of the two families call the same thing.
SHAPES = {
    "layers": ("n_layer", "num_hidden_layers"),
    "width": ("n_embd", "hidden_size"),
    "heads": ("n_head", "num_attention_heads"),
}
TABLES: dict[str, Callable[[], str]] = {
    "formats": format_overview,
    "format values": format_values,
    "analyses": analyses,
    "methods": all_methods,
    "models": sizes,
    "optimizers": optimizers,
    "results": results,
    "checks cpu": partial(checks, "cpu"),
    "checks gpu": partial(checks, "gpu"),
    "gaps cpu": partial(gaps, "cpu"),
    "gaps gpu": partial(gaps, "gpu"),
    "steps gpu": steps,
    "tree": tree,
    "eightbit checks": eightbit_checks,
    "eightbit lm": eightbit_lm,
    "eightbit classifiers": eightbit_classifiers,
    "eightbit errors": eightbit_errors,
    "eightbit drift": eightbit_drift,
    "eightbit memory": partial(eightbit_memory, checkpointed=True),
    "eightbit memory whole": partial(eightbit_memory, checkpointed=False),
    "eightbit memory check": eightbit_memory_check,
    "eightbit gpu": eightbit_gpu,
    "distillation checks": distillation_checks,
    "distillation sizes": distillation_sizes,
    "distillation speed": distillation_speed,
    **{f"distillation {task}": partial(distillation_arms, task) for task in DISTILLED},
    **{
        name: make
        for path in sorted((ROOT / "docs").glob("*_tables.py"))
        for name, make in runpy.run_path(str(path))["TABLES"].items()
    },
    **{f"recipes {family}": partial(recipe_table, family) for family in recipes.FAMILIES},
}


def render(page: str) -> str:
    """Return a page with every table made anew."""
    return MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], page)


def stale() -> dict[Path, str]:
    """Return the pages whose tables differ from the code, each with what it should be."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return {page: new for page, text in texts.items() if (new := render(text)) != text}


if __name__ == "__main__":
    for path, text in stale().items():
        path.write_text(text, encoding="utf-8")
        print(f"docs: wrote the tables of {path.relative_to(ROOT)}")
