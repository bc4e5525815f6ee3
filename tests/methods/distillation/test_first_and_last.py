# SPDX-License-Identifier: Apache-2.0
"""First and last layers against tables written by hand."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import relu

from lowbits.errors import ConversionError
from lowbits.methods.distillation import first_and_last

IDS = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "use_cache": False}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


class OutputFirst(nn.Module):
    """Registers its layers in an order of its own, as the published CIFAR network does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(8, 10)
        self.fc1 = nn.Linear(4, 8)
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.side = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.convs[1](relu(self.convs[0](x)))) + self.side(x)
        return self.norm(self.fc2(relu(self.fc1(y.mean((2, 3))))))


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 6),
        nn.ReLU(), nn.Linear(6, 10),
    )  # fmt: skip


def gpt2(tied: bool) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, tie_word_embeddings=tied)
    )


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=False, **SMALL)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=32, max_position_embeddings=16, **SMALL)
    )


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SMALL)
    return transformers.ViTForImageClassification(config)


class Translator(nn.Module):
    """Two recurrent layers and two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, 6), nn.Embedding(11, 6)
        self.encoder, self.decoder = nn.LSTM(6, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.source(source))
        return self.head(self.decoder(self.target(target), state)[0])


IMAGE = (torch.zeros(2, 3, 8, 8),)
GPT_FIRST = {"transformer.wte.weight", "transformer.wpe.weight"}
BERT_FIRST = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
TABLE = {
    "cnn": (OutputFirst, IMAGE, {}, {"convs.0.weight", "side.weight"}, {"fc2.weight"}),
    "vgg": (vgg, IMAGE, {}, {"0.weight"}, {"8.weight"}),
    "gpt2 tied": (lambda: gpt2(True), (), IDS, GPT_FIRST, {"transformer.wte.weight"}),
    "gpt2 untied": (lambda: gpt2(False), (), IDS, GPT_FIRST, {"lm_head.weight"}),
    "llama": (llama, (), IDS, {"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "bert": (bert, (), {"input_ids": IDS["input_ids"]}, BERT_FIRST, {"classifier.weight"}),
    "vit": (vit, IMAGE, {}, {"vit.embeddings.patch_embeddings.projection.weight"}, {"classifier.weight"}),
    "translator": (
        Translator, (torch.zeros(1, 3, dtype=torch.int64),) * 2, {}, {"source.weight", "target.weight"}, {"head.weight"}
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # from inside torch.export
@pytest.mark.parametrize("name", TABLE)
def test_the_graph_says_what_the_hand_does(name: str) -> None:
    make, args, kwargs, first, last = TABLE[name]
    found = first_and_last(make().eval(), args, kwargs)
    assert (set(found.first), set(found.last)) == (first, last)


def test_what_cannot_be_traced_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * len(x.nonzero().tolist())

    with pytest.raises(ConversionError, match="no linear, convolution or embedding layer|cannot be traced"):
        first_and_last(Odd(), (torch.ones(3),))
    with pytest.raises(ConversionError, match="no linear, convolution or embedding layer"):
        first_and_last(nn.ReLU(), (torch.ones(3),))
