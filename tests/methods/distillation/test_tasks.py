# SPDX-License-Identifier: Apache-2.0
"""The three kinds of task with models of transformers: a student in few bits draws nearer to its teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

from lowbits.export import load_coded, save_coded
from lowbits.methods.distillation import (
    Levels,
    Mixing,
    Teacher,
    coded_model,
    distillation_loss,
    quantize_weights_,
    settle_,
)
from lowbits.quantizers import PerGroup

IDS = torch.randint(3, 30, (6, 9), generator=torch.Generator().manual_seed(0))
PADDED = IDS.masked_fill(torch.arange(9) >= torch.tensor([9, 5, 7, 9, 3, 9])[:, None], -100)
KINDS = torch.tensor([0, 1, 2, 1, 0, 2])


def bert(width: int) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=2 * width,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def llama(width: int) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def t5(width: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


TASKS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "classification": (bert, {"input_ids": IDS}, lambda z: z, KINDS),
    "language modelling": (llama, {"input_ids": IDS, "use_cache": False}, lambda z: z[:, :-1], IDS[:, 1:]),
    "sequence to sequence": (t5, {"input_ids": IDS.flip(1), "labels": PADDED}, lambda z: z, PADDED),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_student_in_few_bits_learns_from_a_larger_teacher(name: str, tmp_path) -> None:
    make, batch, cut, labels = TASKS[name]
    big, student = make(32), make(16)
    fit(big, lambda: distillation_loss(cut(big(**batch).logits), cut(big(**batch).logits), labels, Mixing(0.0)))
    teacher = Teacher(big)
    quantize_weights_(student, Levels.of_bits(3, PerGroup(16)))
    losses = fit(student, lambda: distillation_loss(cut(student(**batch).logits), cut(teacher(**batch)), labels))
    assert losses[-1] < 0.7 * losses[0]

    student.eval()
    with torch.no_grad():
        expected = student(**batch).logits
    save_coded(tmp_path / "student.safetensors", coded_model(student))
    plain = make(16)
    plain.load_state_dict(load_coded(tmp_path / "student.safetensors").state_dict())
    settle_(student)
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, expected) and torch.equal(student(**batch).logits, expected)


def fit(model: nn.Module, loss: Callable[[], Tensor]) -> list[float]:
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        found = loss()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    return losses
