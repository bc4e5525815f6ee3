# SPDX-License-Identifier: Apache-2.0
"""`lowbits analyze ptq`, `perplexity` and `fewshot`: how good the finished model is, and what quantizing costs it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import tyro
from torch import nn

from lowbits import analysis, recipes
from lowbits.cli._analyze_options import Options, Outcome, table
from lowbits.cli._subject import Subject
from lowbits.errors import DataError
from lowbits.nn import high_precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODES = {"on": nullcontext, "off": high_precision}


@dataclass(frozen=True, kw_only=True)
class Ptq(Options):
    """What would the finished model lose if it were quantized now, without further training?

    Runs its forward pass under several recipes, on weights that did not learn to be quantized; compare with the losses
    of models trained under the same recipes.

    Args:
        to: recipes; only what they do in the forward pass counts.
    """

    to: Annotated[list[str], tyro.conf.arg(metavar="NAME ...")] = field(
        default_factory=lambda: ["w8_channel", "w4_channel", "w4_tensor", "a8_token", "a4_token", "w8a8"]
    )

    def run(self, subject: Subject) -> Outcome:
        """Evaluate the validation batches in high precision and under each recipe."""
        chosen = {name: recipes.named(name) for name in self.to}
        batches = subject.batches(self.data, self.batches, self.batch_size)

        @torch.no_grad()
        def loss(model: nn.Module) -> float:
            return sum(analysis.causal_loss(model, ids).item() * len(ids) for ids in batches) / sum(map(len, batches))

        as_trained = loss(subject.model)
        found = analysis.compare_post_training(subject.model, chosen, loss)
        shown = table("quantized after training to", "loss", "lost, nats")
        for name, value in found.items():
            shown.add_row(name, f"{value:.4f}", f"{value - found['high_precision']:+.4f}")
        note = f"as trained ({subject.recipe or 'high precision'}): {as_trained:.4f}"
        return Outcome(shown, {"loss_as_trained": as_trained, "loss": found}, note)


@dataclass(frozen=True, kw_only=True)
class Perplexity(Options):
    """How well does the model predict text files, quantizers on and off, and in other forms that its method gives it?

    Every token counts alike, and every token but a file's first is scored. Bits a byte compare models with different
    tokenizers.

    Args:
        files: UTF-8 text files, also .xz and .gz.
        window: tokens that the model sees at once; as in training if not given.
        stride: tokens scored per window; fewer than the window give each more context.
    """

    files: tuple[Path, ...]
    window: int | None = None
    stride: int | None = None

    def run(self, subject: Subject) -> Outcome:
        """Score the files in every mode."""
        tokenizer, window = _tokenizer(subject), self.window or subject.block
        shown = table("quantizers", "tokens", "loss", "perplexity", "bits a byte")
        result: dict[str, object] = {"files": [str(file) for file in self.files], "window": window}
        modes = {name: mode(subject.model) for name, mode in _MODES.items()}
        for name, mode in (modes | subject.method.forms(subject.model)).items():
            with mode:
                score = analysis.text_perplexity(
                    subject.model, tokenizer, self.files, window=window, stride=self.stride, batch=self.batch_size
                )
            values = {"loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
            shown.add_row(name, f"{score.tokens:,}", *(f"{value:.4f}" for value in values.values()))
            result[f"quantizers_{name}"] = {"tokens": score.tokens, "bytes": score.bytes, **values}
        return Outcome(shown, result)


@dataclass(frozen=True, kw_only=True)
class Fewshot(Options):
    """How often does the model pick the right answer, quantizers on and off? (lm-eval, extra `eval`)

    The study's protocol: 5 examples in the prompt, drawn with 5 seeds, answers scored by their log-likelihood.

    Args:
        tasks: names that lm-eval knows; their data comes from the hub.
        shots: examples in the prompt.
        seeds: of the draw of the examples.
        limit: only so many questions a task.
        include: a folder of further task files.
    """

    tasks: Annotated[list[str], tyro.conf.arg(metavar="NAME ...")] = field(default_factory=lambda: list(analysis.TASKS))
    shots: int = 5
    seeds: tuple[int, ...] = analysis.SEEDS
    limit: int | None = None
    include: Path | None = None

    def run(self, subject: Subject) -> Outcome:
        """Evaluate the tasks twice."""
        tokenizer = _tokenizer(subject)
        found = {}
        for name, mode in _MODES.items():
            with mode(subject.model):
                found[name] = analysis.fewshot(
                    subject.model, tokenizer, self.tasks, shots=self.shots, seeds=self.seeds, limit=self.limit,
                    include=self.include,
                )  # fmt: skip
        shown = table("task", *(f"accuracy, quantizers {name}" for name in found))
        for task in found["on"]:
            scores = (accuracies[task] for accuracies in found.values())
            shown.add_row(task, *(f"{score.mean:.1%} ± {score.deviation:.1%}" for score in scores))
        result = {f"quantizers_{name}": {t: asdict(a) for t, a in tasks.items()} for name, tasks in found.items()}
        return Outcome(shown, {"shots": self.shots, "seeds": self.seeds, **result})


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not (subject.source / "tokenizer_config.json").is_file():
        raise DataError(f"{subject.source} holds no tokenizer, so it cannot read text; copy the tokenizer files there.")
    return AutoTokenizer.from_pretrained(str(subject.source))
