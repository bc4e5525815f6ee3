# SPDX-License-Identifier: Apache-2.0
"""Train with transformers' Trainer: two lines differ from a script without lowbits."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowbits.nn import convert_
from lowbits.optim import AdamW, param_groups
from lowbits.recipes import named

QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}


def main() -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(sizes)
    convert_(model, named("w8a8"))  # the first line
    optimizer = AdamW(param_groups(model, weight_decay=0.1), lr=3e-3)  # the second

    counting = torch.arange(32) + torch.arange(32)[:, None]
    data = [{"input_ids": row, "labels": row} for row in counting]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=20, per_device_train_batch_size=8, use_cpu=True, **QUIET)
        result = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
    print(f"mean loss over 20 steps: {result.training_loss:.3f}")


if __name__ == "__main__":
    main()
