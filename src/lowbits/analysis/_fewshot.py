# SPDX-License-Identifier: Apache-2.0
"""Few-shot accuracy with `lm-eval` (extra `eval`), on the model as it stands: quantizers on, or off.

The study's protocol: 5 examples in the prompt, drawn with 5 seeds; a choice is scored by the log-likelihood of its
continuation, not normalised by length. lm-eval cuts a prompt that is too long on the left and keeps the continuation
whole, which the study's own copy got wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbits.errors import DataError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEDS = (42, 1234, 1337, 2024, 1357)
TASKS = (
    "mnli", "mrpc", "rte", "qnli", "sst2", "wnli", "arc_easy", "arc_challenge", "hellaswag",
)  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one task over seeds.

    Args:
        mean: over the seeds, 0 to 1.
        deviation: standard deviation over the seeds; 0 for a single one.
        per_seed: in the order of the seeds.
    """

    mean: float
    deviation: float
    per_seed: tuple[float, ...]


def fewshot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | dict[str, Any]] = TASKS,
    *,
    shots: int = 5,
    seeds: Sequence[int] = SEEDS,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, Accuracy]:
    """Score a model on multiple-choice tasks of `lm-eval`.

    Args:
        model: on its device; evaluated as it stands, so wrap the call in `high_precision` for quantizers off.
        tokenizer: the model's.
        tasks: names that lm-eval knows (their data is fetched from the hub), or task configurations as dictionaries.
        shots: examples in the prompt.
        seeds: of the draw of the examples; one evaluation each.
        limit: only so many questions a task.
        include: a folder of further task files.
    Returns:
        Accuracy by task name.
    Raises:
        RunError: lm-eval is not installed.
        DataError: a task reports no accuracy, or its name is unknown.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RunError(f"few-shot evaluation needs lm-eval ({error}); run `pip install lowbits[eval]`.") from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise DataError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")
    # typed for the kinds of model that it accepts in one argument; an instance is one of them
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)  # pyright: ignore[reportArgumentType]
    runs = [
        simple_evaluate(
            model=wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager,
            bootstrap_iters=0, log_samples=False, fewshot_random_seed=seed,
        )
        for seed in seeds
    ]  # fmt: skip
    scores = [_accuracies(run["results"]) for run in runs if run is not None]
    return {task: _summary([score[task] for score in scores]) for task in scores[0]}


def _accuracies(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    without = [task for task, metrics in results.items() if "acc,none" not in metrics]
    if without:
        raise DataError(f"{without[0]} is no multiple-choice task: lm-eval reports no accuracy for it. Leave it out.")
    return {task: float(metrics["acc,none"]) for task, metrics in results.items()}


def _summary(values: list[float]) -> Accuracy:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Accuracy(statistics.fmean(values), deviation, tuple(values))
