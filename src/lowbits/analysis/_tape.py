# SPDX-License-Identifier: Apache-2.0
"""Write down, operation by operation, what autograd keeps in a forward pass of GPT-2 or Llama as transformers has them.

Nothing runs. A `Value` is a tensor with a name for its storage; keeping the same storage twice costs nothing, as in
autograd. The rules, for bf16 autocast and for float32:

    linear, plain      its input, cast to bf16 under autocast (each layer casts for itself), and the weight's bf16 copy
    linear, converted  its input, cast likewise; or, with `Save.QUANTIZED`, the codes of input and weight
    layer norm         its input, and two float32 numbers a token
    RMS norm           its input, the float32 normalised input, and a float32 number a token
    attention          q, k, v, the output, and a float32 number a token and head (flash and memory-efficient kernels)
    gelu_new           written out in elementary operations, of which four keep a tensor as large as their input; on
                       CUDA autocast runs `pow` in float32 and type promotion carries that to the output
    silu(gate) * up    gate, silu(gate), up
    rotary             cos and sin, once
    cross entropy      float32 log-probabilities, and the labels

Shapes: N tokens, d width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lowbits.analysis._stored import stored_bytes
from lowbits.nn import Recipe, Save


class Kind(Enum):
    """What a kept tensor is kept for."""

    LINEAR_INPUT = "inputs of linear layers"
    WEIGHT_COPY = "autocast and quantized copies of weights"
    ATTENTION = "attention"
    NORM = "norms"
    ACTIVATION = "activation functions"
    LOSS = "loss"
    INDEX = "token and position ids"


@dataclass(frozen=True)
class Value:
    """A tensor of the forward pass: `[rows, columns]` with `itemsize` bytes an element, in the storage `key`."""

    key: str
    rows: int
    columns: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.rows * self.columns * self.itemsize


@dataclass
class Kept:
    """A storage that autograd keeps.

    Args:
        nbytes: its size.
        kind: what it was first kept for.
        codes: bytes of the codes by which converted layers could keep it instead.
        whole: something other than the input of a quantizing layer needs it as it is.
    """

    nbytes: int
    kind: Kind
    codes: int = 0
    whole: bool = False


@dataclass
class Tape:
    """What is kept, by storage.

    Args:
        batch: sequences.
        length: tokens in a sequence.
        autocast: bf16 autocast; False is float32.
        cuda: the rules of CUDA's autocast instead of the CPU's.
        recipes: recipe by layer name, for the layers that are converted.
        itemsize: bytes of an element of the weights, and of what is computed from them without autocast.
    """

    batch: int
    length: int
    autocast: bool
    cuda: bool
    recipes: dict[str, Recipe]
    itemsize: int = 4
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N."""
        return self.batch * self.length

    @property
    def compute(self) -> int:
        """Bytes of an element of what a GEMM returns."""
        return 2 if self.autocast else self.itemsize

    def keep(self, value: Value, kind: Kind, codes: int = 0) -> Value:
        """Note that a storage is kept, as it is or as that many bytes of codes; the first kind counts."""
        kept = self.kept.setdefault(value.key, Kept(value.nbytes, kind))
        kept.codes += codes
        kept.whole |= not codes
        return value

    def residual(self, key: str, width: int) -> Value:
        """Return a tensor of the residual stream, which has the dtype of the embedding throughout."""
        return Value(key, self.tokens, width, self.itemsize)

    def linear(self, name: str, x: Value, outputs: int) -> Value:
        """Keep what a linear layer keeps, and return its output."""
        recipe = self.recipes.get(name, Recipe())
        if recipe.plain:
            self._plain_linear(name, x, outputs)
        elif recipe.save is Save.ORIGINAL:
            lhs = recipe.fprop.lhs
            codes = 0 if lhs is None else stored_bytes((x.rows, x.columns), lhs)
            self.keep(self._cast(name, x), Kind.LINEAR_INPUT, codes)
        else:
            assert recipe.fprop.lhs is not None and recipe.fprop.rhs is not None  # Recipe has checked it
            codes = stored_bytes((x.rows, x.columns), recipe.fprop.lhs)
            weight = stored_bytes((outputs, x.columns), recipe.fprop.rhs)
            self.keep(Value(f"{name}.input", 1, codes, 1), Kind.LINEAR_INPUT)
            self.keep(Value(f"{name}.weight", 1, weight, 1), Kind.WEIGHT_COPY)
        return Value(name, x.rows, outputs, self.compute)

    def _plain_linear(self, name: str, x: Value, outputs: int) -> None:
        self.keep(self._cast(name, x), Kind.LINEAR_INPUT)
        if self.autocast:
            self.keep(Value(f"{name}.weight", x.columns, outputs, 2), Kind.WEIGHT_COPY)

    def _cast(self, name: str, x: Value) -> Value:
        """Return x in the compute dtype; each layer casts for itself."""
        return x if x.itemsize == self.compute else Value(f"{name}.input", x.rows, x.columns, self.compute)

    def layer_norm(self, name: str, x: Value) -> Value:
        """Keep what `nn.LayerNorm` keeps: x, mean and reciprocal deviation."""
        self.keep(x, Kind.NORM)
        self.keep(Value(f"{name}.statistics", x.rows, 2, 4), Kind.NORM)
        return Value(name, x.rows, x.columns, x.itemsize)

    def rms_norm(self, name: str, x: Value) -> Value:
        """Keep what transformers' `LlamaRMSNorm` keeps: x in float32, rsqrt(mean x^2), and their product."""
        self.keep(x if x.itemsize == 4 else Value(f"{name}.float", x.rows, x.columns, 4), Kind.NORM)
        self.keep(Value(f"{name}.statistics", x.rows, 1, 4), Kind.NORM)
        self.keep(Value(f"{name}.normalised", x.rows, x.columns, x.itemsize), Kind.NORM)
        return Value(name, x.rows, x.columns, x.itemsize)

    def attention(self, name: str, inputs: list[Value], heads: int, width: int) -> Value:
        """Keep what scaled-dot-product attention keeps: its inputs, its output and the log-sum-exp."""
        for value in inputs:
            self.keep(value, Kind.ATTENTION)
        self.keep(Value(f"{name}.logsumexp", self.tokens, heads, 4), Kind.ATTENTION)
        return self.keep(Value(f"{name}.out", self.tokens, width, self.compute), Kind.ATTENTION)

    def gelu_new(self, name: str, u: Value) -> Value:
        """Keep what 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) keeps, written out as transformers has it."""
        wide = 4 if self.cuda and self.autocast else u.itemsize  # pow returns float32 under CUDA's autocast
        cubed = u if wide == u.itemsize else Value(f"{name}.pow", u.rows, u.columns, wide)
        self.keep(cubed, Kind.ACTIVATION)
        self.keep(Value(f"{name}.tanh", u.rows, u.columns, wide), Kind.ACTIVATION)
        self.keep(Value(f"{name}.half", u.rows, u.columns, u.itemsize), Kind.ACTIVATION)
        self.keep(Value(f"{name}.one_plus_tanh", u.rows, u.columns, wide), Kind.ACTIVATION)
        return Value(name, u.rows, u.columns, wide)

    def gated_silu(self, name: str, gate: Value, up: Value) -> Value:
        """Keep what silu(gate) * up keeps: both factors and the gate."""
        self.keep(gate, Kind.ACTIVATION)
        self.keep(Value(f"{name}.silu", gate.rows, gate.columns, gate.itemsize), Kind.ACTIVATION)
        self.keep(up, Kind.ACTIVATION)
        return Value(f"{name}.product", gate.rows, gate.columns, gate.itemsize)

    def cross_entropy(self, vocabulary: int) -> None:
        """Keep what `lowbits.train`'s loss keeps; the last position of a sequence predicts nothing.

        Float32 log-probabilities, int64 labels (a view of the ids for a single sequence) and the labels' total weight.
        """
        predictions = self.tokens - self.batch
        self.keep(Value("loss.log_softmax", predictions, vocabulary, 4), Kind.LOSS)
        self.keep(Value("loss.labels" if self.batch > 1 else "ids", predictions, 1, 8), Kind.LOSS)
        self.keep(Value("loss.weight", 1, 1, 4), Kind.LOSS)

    def total(self) -> int:
        """Bytes of all kept storages."""
        return sum(kept.nbytes for kept in self.kept.values())

    def in_few_bits(self) -> int:
        """Bytes if every quantizing layer kept the codes of its input."""
        return sum(kept.codes + kept.whole * kept.nbytes for kept in self.kept.values())

    def by_kind(self) -> dict[Kind, int]:
        """Bytes by what they are kept for, every kind present."""
        totals = dict.fromkeys(Kind, 0)
        for kept in self.kept.values():
            totals[kept.kind] += kept.nbytes
        return totals
