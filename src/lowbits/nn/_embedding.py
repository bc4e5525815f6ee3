# SPDX-License-Identifier: Apache-2.0
"""The stable embedding of the 8-bit optimizers' paper (arXiv:2110.02861, sec. 2.3).

    e = layer_norm(weight[token]),   weight ~ U(-a, a),  a = sqrt(6 / (tokens + width)),   before positions are added

The rows that get gradients differ from step to step, and so do their sizes; the norm evens them out. Its moments stay
in 32 bits: `param_groups(model, decay, embeddings_in_32_bits)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbits.errors import ConversionError


class StableEmbedding(nn.Embedding):
    """`nn.Embedding` with Xavier-uniform weights and a LayerNorm on what it looks up.

    The norm is computed in float32 and its result cast back to the weight's dtype. The row of `padding_idx` starts at
    zero. Arguments are those of `nn.Embedding`; `weight` has the same name, `norm.weight` and
    `norm.bias` are new.
    """

    norm: nn.LayerNorm

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights anew, Xavier-uniform; the norm is left as it is."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized vectors.

        Args:
            input: indices, any shape.
        Returns:
            Of the weight's dtype, [*input.shape, embedding_dim].
        """
        vectors = super().forward(input).float()
        norm = self.norm
        normalized = functional.layer_norm(
            vectors, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )
        return normalized.to(self.weight.dtype)


def stable_embedding_(model: nn.Module, choose: Callable[[str, nn.Embedding], bool] | None = None) -> list[str]:
    """Make the token embedding of a model that is to be trained from scratch a `StableEmbedding`, in place.

    The weight is drawn anew but stays the same object: an output head that is tied to it stays tied. Positions are
    left alone. Call it after construction, before the optimizer is made, `convert_`, `torch.compile` and wrapping.

    The state dict has two more entries, `norm.weight` and `norm.bias`, beside the weight's unchanged name. What
    `save_pretrained` writes has them too, but `from_pretrained` builds the model without the norm and leaves them out:
    build the model from its config, convert it, then `load_state_dict`.

    Args:
        model: not pretrained: with a norm added after pretraining, fine-tuning is poor. Fine-tune with
            `embeddings_in_32_bits` alone.
        choose: `(name, embedding) -> bool`. Default: what transformers calls the input embeddings, or the model's only
            `nn.Embedding`.
    Returns:
        Names of the converted embeddings.
    Raises:
        ConversionError: the model was loaded by `from_pretrained`; none or several could be meant; or one has
            `max_norm`, which the norm would undo. Nothing is changed then.
    """
    source = getattr(model, "name_or_path", "")
    if source:
        raise ConversionError(
            f"stable_embedding_: {type(model).__name__} was loaded from {source!r}; a norm added after pretraining "
            "makes fine-tuning poor. Keep it as it is, with moments in 32 bits: choose=embeddings_in_32_bits."
        )
    chosen = _chosen(model, choose)
    for name, embedding in chosen.items():
        if embedding.max_norm is not None:
            raise ConversionError(
                f"stable_embedding_: {name} has max_norm={embedding.max_norm}; remove it, or leave it out."
            )
    for embedding in chosen.values():
        weight = embedding.weight
        embedding.__class__ = StableEmbedding  # the module stays the same object, so ties, hooks and references survive
        embedding.norm = nn.LayerNorm(embedding.embedding_dim, device=weight.device, dtype=weight.dtype)  # type: ignore[assignment]
        embedding.reset_parameters()
    return list(chosen)


def _chosen(model: nn.Module, choose: Callable[[str, nn.Embedding], bool] | None) -> dict[str, nn.Embedding]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    get = getattr(model, "get_input_embeddings", None)
    tokens = get() if callable(get) else None
    if choose is not None:
        chosen = {n: m for n, m in found.items() if choose(n, m)}
    elif tokens is not None:
        chosen = {n: m for n, m in found.items() if m is tokens}
    else:
        chosen = found if len(found) == 1 else {}
    wrong = {n: type(m).__name__ for n, m in chosen.items() if type(m) is not nn.Embedding}
    if wrong or not chosen:
        raise ConversionError(
            f"stable_embedding_: of the embeddings {', '.join(found) or '(none)'} of {type(model).__name__} "
            + (f"{wrong} has a forward of its own." if wrong else "none or several could be meant. Pass choose=.")
        )
    return chosen
