# SPDX-License-Identifier: Apache-2.0
"""Train with transformers' Trainer and an optimizer whose moments take two bytes a parameter."""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from lowbits.optim import AdamW8bit, embeddings_in_32_bits, param_groups, state_report

QUIET = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}


def main() -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(sizes)
    optimizer = AdamW8bit(param_groups(model, weight_decay=0.1, choose=embeddings_in_32_bits), lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=20)

    counting = torch.arange(32) + torch.arange(32)[:, None]
    data = [{"input_ids": row, "labels": row} for row in counting]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, max_steps=20, per_device_train_batch_size=8, save_steps=10, **QUIET)
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train()
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-10")  # codes come back bit for bit
    print(f"{state_report(optimizer, model).bytes_per_element:.2f} bytes of state a parameter")


if __name__ == "__main__":
    main()
