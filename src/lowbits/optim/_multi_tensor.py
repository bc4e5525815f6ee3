# SPDX-License-Identifier: Apache-2.0
"""Tables on the device that say where everything of a step lies, and its launches; see `lowbits.kernels.optimizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any
from weakref import proxy

import torch
from torch import Tensor

from lowbits.nn import QParameter
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._clipping import GlobalNorm
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._grid import name_of
from lowbits.optim._sharding import add_up_gradient_, first_element, is_sharded
from lowbits.optim._signature import (
    TYPES,
    Signature,
    bytes_of,
    grid_switches,
    kernels,
    kind_of,
    local_part,
)
from lowbits.optim._steps import SHIFTS, steps_of
from lowbits.quantizers import Noise, Rounding

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer, Target

_CHUNK = 8192  # elements that one program of `update` works on, a tile after the other
_PARTIALS = 1024  # programs, and partial sums, of the gradient norm
_SPAN = 4096  # elements that one of them reads at a time
_ROWS = 128  # that one program of `prepare` works on


@dataclass
class Bucket:
    """The rows of one launch; `mixed`: some of them have float32 moments where the others have codes."""

    signature: Signature
    rows: list[int] = field(default_factory=list)
    chunks: Tensor | None = None
    mixed: bool = False


class Tables:
    """Everything that the launches of one set of parameters on one device need.

    Args:
        optimizer: whose parameters these are; their states exist.
        members: what is updated, with the signature of each.
        counts: of updates by parameter, which all tables of the optimizer keep together.
    """

    def __init__(
        self, optimizer: CodecOptimizer, members: Sequence[tuple[Target, Signature]], counts: dict[Tensor, int]
    ) -> None:
        k = kernels()
        assert k is not None
        # A proxy: the tables are kept as long as the optimizer lives, and must not keep it alive.
        self.k, self.optimizer, self.targets = k, proxy(optimizer), [target for target, _ in members]
        self.parameters = [target.parameter for target in self.targets]
        self.locals = [bytes_of(p) for p in self.parameters]
        self.sizes = [p.numel() for p in self.locals]
        self.shapes = [local_part(p).shape for p in self.parameters]
        self.device = self.locals[0].device
        self.groups = list({id(target.group): target.group for target in self.targets}.values())
        numbers = {id(group): number for number, group in enumerate(self.groups)}
        self.group_of = [numbers[id(target.group)] for target in self.targets]
        self.states = [optimizer.state[p] for p in self.parameters]
        # Where a state is moved, its tensors are: one of them tells.
        self.marks = [next((name for name in state if "." in name), "step") for state in self.states]
        self.counts = counts
        self._seen: list[object] | None = None  # all states of the optimizer, once these were found among them
        self.rules = [optimizer.rule_of(group) for group in self.groups]
        self.sharded = any(is_sharded(p) for p in self.parameters)
        self.grids = any(signature.grid is not None for _, signature in members)
        self.steps_of_weights = self._steps_of_weights()
        self.buckets: dict[Signature, Bucket] = {}
        for row, (target, signature) in enumerate(members):
            bucket = self.buckets.setdefault(signature, Bucket(signature))
            bucket.rows.append(row)
            bucket.mixed |= self._exact(target) and any(codec != FLOAT32 for codec in signature.codecs)
        self.factored = False
        self._kept: list[Tensor] = []  # what a CUDA graph copies from must live as long as the graph
        self._sent: dict[str, Any] = {}
        self._allocate()
        self._fill()
        self.scheduled = any(
            rule.constants(group, 1) != rule.constants(group, t)
            for rule, group in zip(self.rules, self.groups, strict=True) for t in (2, 2**24)
        )  # fmt: skip

    def _exact(self, target: Target) -> bool:
        return all(codec == FLOAT32 for codec in self.optimizer.codecs(target.parameter, target.group).values())

    def _allocate(self) -> None:
        rows, device = len(self.targets), self.device
        self.rows = torch.zeros(rows, int(self.k.COLUMNS), dtype=torch.int64, device=device)
        self.scalars = torch.zeros(rows, int(self.k.WIDTH), device=device)
        self.bases = torch.zeros(rows, 2, dtype=torch.float64, device=device)
        self.factors = torch.ones(rows, device=device)
        self.rates = torch.zeros(len(self.groups), device=device)
        self.partial = torch.zeros(_PARTIALS, dtype=torch.float64, device=device)
        self.limit = torch.zeros((), dtype=torch.float64, device=device)
        codecs = {codec for signature in self.buckets for codec in signature.codecs if isinstance(codec, Blockwise)}
        self.points: dict[StateCodec, Tensor] = {codec: _points_on(codec, device) for codec in codecs}
        coded = [codec for codec in codecs if codec.format in SHIFTS]
        self.steps: dict[StateCodec, Tensor] = {codec: steps_of(codec, device) for codec in coded}
        self.zero = torch.zeros(16, dtype=torch.int32, device=device)

    def _fill(self) -> None:
        k = self.k
        self.table = torch.zeros(self.rows.shape, dtype=torch.int64)
        for row, target in enumerate(self.targets):
            p, state, lr = target.parameter, self.optimizer.state[target.parameter], target.group["lr"]
            rate = lr if self._reads(lr) else self.rates[self.group_of[row]]
            logical, step_of_weight = local_part(p), self.steps_of_weights[row]
            low, high = Noise.of(self.optimizer.seed, name_of(logical, target.name), "weight").key
            stochastic = self.optimizer.rounding is Rounding.STOCHASTIC and p.dtype == torch.bfloat16
            stochastic |= isinstance(logical, QParameter)
            known = {
                k.NUMEL: logical.numel(), k.STEP: state["step"].data_ptr(), k.LR: rate.data_ptr(),
                k.FACTOR: self.factors[row].data_ptr(), k.KEY: _signed(int(low) | int(high) << 32),
                k.OFFSET: first_element(p) if stochastic else 0, k.EXACT: int(self._exact(target)),
                k.UNIT: 0 if step_of_weight is None else step_of_weight.data_ptr(),
                k.CHANNEL: logical.numel() // max(1, logical.shape[0]) if logical.ndim else 1,
            }  # fmt: skip
            for index, moment in enumerate(self.optimizer.rule_of(target.group).moments):
                parts = [local_part(t).data_ptr() for name, t in state.items() if name.startswith(moment + ".")]
                known |= {k.MOMENTS + 2 * index + i: address for i, address in enumerate(parts)}
            for column, value in known.items():
                self.table[row, int(column)] = value
        numel = self.table[:, int(k.NUMEL)]
        for signature, bucket in self.buckets.items():
            blocks, _ = _tile(signature)
            span = signature.size * blocks * _tiles(signature)
            bucket.chunks = _chunks(bucket.rows, numel, span, signature.size).to(self.device)
        every = [row for bucket in self.buckets.values() for row in bucket.rows]
        self.norm_chunks = _chunks(every, numel, _SPAN, _SPAN).to(self.device)

    def __len__(self) -> int:
        """How many parameters these tables update."""
        return len(self.parameters)

    # --- each step --------------------------------------------------------------------------------------------------

    def covers_all(self) -> bool:
        """Whether the parameters and states are those of then, and no other parameter has a gradient."""
        groups, states = self.optimizer.param_groups, self.optimizer.state
        count = sum(len(group["params"]) for group in groups)
        if count != len(self.parameters) + len(self.others) or any(p.grad is not None for p in self.others):
            return False
        seen = self._seen
        if seen is None or len(states) != len(seen) or not all(map(is_, states.values(), seen)):
            if not self.has_states():
                return False
            self._seen = list(states.values())
        return True

    @cached_property
    def others(self) -> list[Tensor]:
        """The optimizer's other parameters."""
        mine = {id(p) for p in self.parameters}
        return [p for group in self.optimizer.param_groups for p in group["params"] if id(p) not in mine]

    def has_states(self) -> bool:
        """Whether the optimizer has the states that the tables were built for."""
        return all(map(is_, map(self.optimizer.state.get, self.parameters), self.states))

    def refresh(self) -> bool:
        """Send what has changed since the last step; False where the tables no longer fit."""
        places = self._places()
        if places is None:
            return False
        if self._sent.get("addresses") != places:
            self.table[:, :2] = torch.tensor(places).t()
            self._send("addresses", places, self.rows, self.table)
        sources = [lr.data_ptr() if self._reads(lr := group["lr"]) else None for group in self.groups]
        if self._sent.setdefault("sources", sources) != sources:
            return False
        rates = [0.0 if self._reads(lr := group["lr"]) else float(lr) for group in self.groups]
        self._send("rates", rates, self.rates, rates)
        constants = self._constants()
        if self._sent.get("constants") != constants:
            self._send("constants", constants, self.scalars, self._by_row(self.scalars.shape[1], constants, 0.0))
            rules = self.rules if not self.scheduled else [self.rules[number] for number in self.group_of]
            bases = [[c[b] for b in rule.corrections] for rule, c in zip(rules, constants, strict=True)]
            if any(bases):
                self._send("bases", constants, self.bases, self._by_row(2, bases))
        return True

    def _places(self) -> list[list[int]] | None:
        """Addresses of parameters and gradients; None where the tables no longer fit them, or a state was moved."""
        if self.sharded:
            for p in self.parameters:
                add_up_gradient_(p)
        gradients: list[Any] = list(map(attrgetter("grad"), self.parameters))
        stored: list[Any] = list(map(dict.get, self.states, self.marks))
        if self.sharded:  # a module that was moved has put other shards into its parameters
            gradients, stored = list(map(local_part, gradients)), list(map(local_part, stored))
        if self.sharded or self.grids:  # or other codes
            self.locals = list(map(bytes_of, self.parameters))
            if self.grids and not all(map(is_, self._steps_of_weights(), self.steps_of_weights)):
                return None
        # Which tensors, not where they lie: a step of many small tensors is as fast as these lines.
        if not all(map(is_, stored, self._sent.setdefault("states", stored))):
            return None
        try:
            places = [list(map(Tensor.data_ptr, tensors)) for tensors in (self.locals, gradients)]
        except TypeError:  # None is no gradient
            return None
        if self.sizes != list(map(Tensor.numel, self.locals)):
            return None
        return places if places == self._sent.get("addresses") or self._fits(gradients, places) else None

    def _steps_of_weights(self) -> list[Tensor | None]:
        return [getattr(local_part(p), "step", None) if self.grids else None for p in self.parameters]

    def _reads(self, lr: float | Tensor) -> bool:
        """Whether the kernels read a learning rate where it lies; others are sent."""
        return isinstance(lr, Tensor) and lr.device == self.device and lr.dtype == torch.float32

    def _constants(self) -> list[dict[str, float]]:
        """By group, or by row where they change with the step."""
        if not self.scheduled:
            return [rule.constants(group, 1) for rule, group in zip(self.rules, self.groups, strict=True)]
        unknown = [
            (p, state["step"]) for p, state in zip(self.parameters, self.states, strict=True) if p not in self.counts
        ]
        if unknown:
            steps = torch.stack([step for _, step in unknown]).tolist()
            self.counts.update((p, int(t)) for (p, _), t in zip(unknown, steps, strict=True))
        for p in self.parameters:
            self.counts[p] += 1
        rows = zip(self.group_of, self.parameters, strict=True)
        return [self.rules[number].constants(self.groups[number], self.counts[p]) for number, p in rows]

    def _by_row(self, width: int, values: Sequence[Any], *before: float) -> Tensor:
        whole = torch.zeros(len(values), width, dtype=torch.float64)
        for row, value in enumerate(values):
            numbers = [*before, *(value.values() if isinstance(value, Mapping) else value)]
            whole[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        return whole if self.scheduled else whole[torch.tensor(self.group_of)]

    def _fits(self, gradients: Sequence[Tensor], places: Sequence[Sequence[int]]) -> bool:
        for signature, bucket in self.buckets.items():
            for row in bucket.rows:
                g, p = gradients[row], self.locals[row]
                alike = g.dtype == signature.gradient and p.dtype == signature.parameter
                alike &= g.shape == self.shapes[row]
                if not alike or g.device != self.device or p.device != self.device:
                    return False
                if not g.is_contiguous() or not p.is_contiguous():
                    return False
                if signature.aligned and (places[0][row] | places[1][row]) % 16:
                    return False
        return True

    def _send(self, name: str, value: object, to: Tensor, values: Tensor | Sequence[float]) -> None:
        """Copy from pinned memory, in stream order, without waiting; nothing where nothing changed."""
        if self._sent.get(name) == value:
            return
        self._sent[name] = value
        values = torch.as_tensor(values).to(to.dtype)
        if to.device.type == "cuda":
            values = values.pin_memory()
            if torch.cuda.is_current_stream_capturing():
                self._kept.append(values)
        to.copy_(values, non_blocking=True)

    def launch(self) -> None:
        """Launch the step: the norm where it is asked for, what is common, and every bucket."""
        k, clip = self.k, self.optimizer.clip
        scale, found_inf = getattr(self.optimizer, "grad_scale", None), getattr(self.optimizer, "found_inf", None)
        dtypes = {signature.gradient for signature in self.buckets}
        within = clip is None or (isinstance(clip, GlobalNorm) and not self.sharded and len(dtypes) == 1)
        if within and self.factored:
            self.factors.fill_(1.0)
        self.factored = not within
        if not within:
            factors = self.optimizer._gradient_factors(self.targets)
            assert factors is not None
            self.factors.copy_(factors.expand(len(self.targets)))
            clip = scale = found_inf = None
        if clip is not None:
            self._send("limit", clip.limit, self.limit, torch.tensor(clip.limit))
            k.squares[(_PARTIALS,)](
                self.rows, self.norm_chunks, len(self.norm_chunks), self.partial, G_TYPE=self._type(dtypes.pop()),
                SPAN=_SPAN, ALIGN=16 if all(s.aligned for s in self.buckets) else 1, num_warps=8,
                enable_fp_fusion=False,
            )  # fmt: skip
        one, zero = self.factors, self.zero
        width = 1 + max(len(rule.constants(g, 1)) for rule, g in zip(self.rules, self.groups, strict=True))
        k.prepare[(-(-len(self.targets) // _ROWS),)](
            self.rows, self.scalars, self.bases, len(self.targets), self.partial, self.limit,
            one if scale is None else scale.to(self.device), zero if found_inf is None else found_inf.to(self.device),
            CLIP=clip is not None, SCALED=scale is not None or found_inf is not None, PARTIALS=_PARTIALS,
            CORRECTIONS=max(len(rule.corrections) for rule in self.rules), FIRST=width, TILE=_ROWS,
            enable_fp_fusion=False,
        )  # fmt: skip
        for bucket in self.buckets.values():
            self._update(bucket)

    def _update(self, bucket: Bucket) -> None:
        k, s = self.k, bucket.signature
        kinds = [getattr(k, kind_of(codec) or "FLOAT32") for codec in s.codecs] + [k.NONE] * (3 - len(s.codecs))
        unread = 3 - len(s.codecs)
        points = [self.points.get(codec, self.scalars) for codec in s.codecs] + [self.scalars] * unread
        tables = [self.steps.get(codec, self.zero) for codec in s.codecs] + [self.zero] * unread
        blocks, warps = _tile(s)
        assert bucket.chunks is not None
        k.update[(len(bucket.chunks),)](
            self.rows, self.scalars, bucket.chunks, *points, *tables, RULE=getattr(k.rules, s.rule),
            A=kinds[0], B=kinds[1], C=kinds[2], MIXED=bucket.mixed, P_TYPE=self._type(s.parameter),
            G_TYPE=self._type(s.gradient), STOCHASTIC=s.stochastic, SIZE=s.size, BLOCK=_power_of_two(s.size),
            NB=blocks, TILES=_tiles(s), ALIGN=16 if s.aligned else 1, num_warps=warps, enable_fp_fusion=False,
            **grid_switches(s),
        )  # fmt: skip

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self.k.tl, TYPES[dtype])


@cache
def _points_on(codec: Blockwise, device: torch.device) -> Tensor:
    return torch.tensor(codec.points, device=device)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(s: Signature) -> tuple[int, int]:
    """Return how many blocks make a tile, and how many warps work on it: what was fastest on an H200.

    Two moments in 8-bit codes beside a 16-bit parameter leave so little to move that arithmetic counts: one warp and
    eight elements a thread then.
    """
    coded = [kind_of(codec) for codec in s.codecs if isinstance(codec, Blockwise)]
    lean = s.parameter.itemsize <= 2 and len(coded) == 2 and set(coded) <= {"SIGNED", "UNSIGNED"}
    elements, warps = (256, 1) if lean else (512, 2)
    block = _power_of_two(s.size)
    return max(1, elements // block), max(warps, block // 512)


def _tiles(s: Signature) -> int:
    blocks, _ = _tile(s)
    return max(1, _CHUNK // (blocks * _power_of_two(s.size)))


def _chunks(rows: Sequence[int], numel: Tensor, span: int, unit: int) -> Tensor:
    """`row << 40 | first unit` for every `span` elements of every row."""
    parts = [torch.arange(0, -(-int(numel[row]) // span)) * (span // unit) | (row << 40) for row in rows]
    return torch.cat(parts)
