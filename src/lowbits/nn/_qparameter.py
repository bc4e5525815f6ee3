# SPDX-License-Identifier: Apache-2.0
"""A parameter that is stored as codes and a step, and looks like a float tensor to autograd.

The one tensor subclass of the library. Its gradient is an ordinary tensor of its `dtype`; an optimizer of
`lowbits.optim` reads codes and writes codes. Any other operation sees the float32 values D q; whatever would write into
them is refused, since nobody said how to round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from lowbits.errors import CheckpointError, ShapeError, SpecError
from lowbits.nn._grid import Grid, rounded

_aten = torch.ops.aten
_HEADER = 1  # version of the layout in a state dict


class QParameter(Tensor):
    """Codes q and a step D that stand for the float32 values D q.

    Args:
        codes: as `grid.pack` stores them, [..., bytes of a row].
        step: D, float32: of no dimension, or [rows, 1, ...] with one for each index of the first axis.
        grid: the codes that there are.
        length: elements of a row, the last axis.
        dtype: of the gradient, and what the parameter claims to be: float32, bfloat16 or float16.
        requires_grad: whether it is trained.
        flat: claim to have one axis; the codes lie as they are.
    Attributes:
        codes: the bytes, int8 or uint8.
        step: D.
        grid: see above.
        row: elements of a row of codes.
        stream: name that keys the random bits of its updates; empty: its place in the optimizer does.
    """

    codes: Tensor
    step: Tensor
    grid: Grid
    stream: str
    row: int

    @staticmethod
    def __new__(  # noqa: PLR0913  the parts of one tensor
        cls,
        codes: Tensor,
        step: Tensor,
        grid: Grid,
        length: int,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
        flat: bool = False,
    ) -> QParameter:
        """Wrap codes and step; nothing is copied."""
        shape = (*codes.shape[:-1], length)
        shape = (math.prod(shape),) if flat else shape
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=codes.device, requires_grad=requires_grad
        )
        made.codes, made.step, made.grid, made.stream = codes, step, grid, ""
        made.row = length
        return made

    def __init__(self, *parts: object, **named: object) -> None:
        """Take the arguments of `__new__`."""

    @staticmethod
    def of(codes: Tensor, step: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> QParameter:
        """Return a trainable parameter of unpacked codes.

        Args:
            codes: int8, at least one axis.
            step: positive and finite, float32: a scalar, or one for each index of the first axis.
            grid: the codes that there are.
            dtype: of the gradient.
        Raises:
            ShapeError: the codes have no axis, or the steps are neither one nor one a row.
            SpecError: a step is not a positive finite number.
        """
        if codes.ndim < 1:
            raise ShapeError("QParameter: codes have at least one axis, got a scalar. View it as [1].")
        step = step.to(torch.float32)
        if step.numel() != 1 or step.ndim:
            if step.numel() != codes.shape[0]:
                raise ShapeError(f"QParameter: one step, or one a row of {codes.shape[0]}, got {tuple(step.shape)}.")
            step = step.reshape(-1, *[1] * (codes.ndim - 1))
        if not step.is_meta and not bool(((step > 0) & step.isfinite()).all()):
            raise SpecError(f"QParameter: a step is positive and finite, got {step.flatten()[:4].tolist()}.")
        return QParameter(grid.pack(codes).contiguous(), step.contiguous(), grid, codes.shape[-1], dtype, True)

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def per_channel(self) -> bool:
        """Whether every index of the first axis has a step of its own."""
        return self.step.ndim > 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and steps."""
        return self.codes.nbytes + self.step.nbytes

    def unpacked(self) -> Tensor:
        """Return the codes q, int8, of the parameter's shape; those stored one a byte are not copied."""
        return self.grid.unpack(self.codes, self.row).view(self.shape)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """Return D q, float32: a temporary of full size."""
        codes = self.grid.unpack(self.codes, self.row)
        return (codes.to(torch.float32) * self.step).view(self.shape)

    def store_(self, codes: Tensor) -> None:
        """Replace the codes.

        Args:
            codes: int8, of the parameter's shape, on its grid.
        """
        self.codes.copy_(self.grid.pack(codes.view(*self.codes.shape[:-1], self.row)))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        # Compilers ask for words of tensors without numbers.
        known = type(self.step) is Tensor and not self.step.is_meta
        step = "per row" if self.per_channel else f"{float(self.step):.3g}" if known else "unknown"
        return f"QParameter({tuple(self.shape)}, {self.grid}, step {step}, {self.dtype}, {self.device})"

    # --- torch.compile ----------------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Grid, int, torch.dtype]]:
        """Name the tensors within, and return the rest."""
        return ["codes", "step"], (self.grid, self.row, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], rest: tuple[Grid, int, torch.dtype], size: object, stride: object
    ) -> QParameter:
        """Put it together again."""
        return QParameter(inner["codes"], inner["step"], *rest)

    # --- operations -------------------------------------------------------------------------------------------------

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the values; see the module."""
        kwargs = kwargs or {}
        if func in _OPERATIONS:
            return _OPERATIONS[func](func, args, kwargs)
        schema = func._schema
        for given, argument in zip(args, schema.arguments, strict=False):
            if isinstance(given, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise SpecError(
                    f"{func} would write floats into a parameter of {given.grid}, which holds codes alone. Update it "
                    "with an optimizer of lowbits.optim, or make a new one with lowbits.nn.quantize_parameter."
                )
        plain = [tree_map(lambda x: x.dequantize().to(x.dtype) if isinstance(x, cls) else x, a) for a in (args, kwargs)]
        return func(*plain[0], **plain[1])

    # --- fully_shard ------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: object, module: object, mp_policy: object
    ) -> tuple[tuple[Tensor, ...], object]:
        """Return what the ranks gather: codes, as they are stored; steps where there is one a row."""
        ranks = mesh.size()
        if outer_size[0] % ranks and (self.per_channel or self.grid.per_byte > 1):
            raise SpecError(
                f"fully_shard: {outer_size[0]} rows of {self.grid} on {ranks} ranks: only codes of one byte with one "
                "step shard unevenly. Take a number of ranks that divides the rows."
            )
        rows = -(-outer_size[0] // ranks)
        codes = self.codes
        if codes.shape[0] != rows:
            codes = torch.nn.functional.pad(codes, (0, 0) * (codes.ndim - 1) + (0, rows - codes.shape[0]))
        return ((codes, self.step) if self.per_channel else (codes,)), self.step

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: Tensor, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[QParameter, tuple[Tensor, ...]] | None:
        """Return the whole parameter; its codes are what was gathered."""
        if out is not None:  # made of the same memory before
            return None
        step = gathered[1] if self.per_channel else metadata
        return QParameter(gathered[0], step, self.grid, self.row, param_dtype), gathered

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Tensor]:
        """Return what a state dict holds, plain tensors: `codes`, `step`, `grid`.

        `grid` is int32: version, lowest and highest code, codes a byte, elements of a row.
        """
        header = [_HEADER, self.grid.low, self.grid.high, self.grid.per_byte, self.row]
        return {"codes": self.codes, "step": self.step, "grid": torch.tensor(header, dtype=torch.int32)}

    @torch.no_grad()
    def load_(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Take over what `parts` returned.

        Args:
            name: of the parameter, for messages.
            parts: `codes`, `step` and `grid`.
        Raises:
            CheckpointError: another width, packing, shape or granularity, steps that are not positive and finite, or
                codes outside of the grid. Nothing is changed then.
        """
        own = self.parts()
        for part in ("grid", "codes", "step"):
            theirs, ours = parts[part], own[part]
            values = (theirs.tolist(), ours.tolist()) if part == "grid" else (theirs.shape, ours.shape)
            if theirs.dtype != ours.dtype or values[0] != values[1]:
                raise CheckpointError(
                    f"{name}.{part}: the checkpoint has {theirs.dtype} {_words(values[0])}, {self.grid} of "
                    f"{tuple(self.shape)} has {ours.dtype} {_words(values[1])}. Build the model with the bits, packing "
                    "and granularity that the checkpoint was written with."
                )
        step = parts["step"]
        if not bool(((step > 0) & step.isfinite()).all()):
            raise CheckpointError(
                f"{name}.step: positive and finite, got {step.flatten()[:4].tolist()}. It is damaged."
            )
        codes = self.grid.unpack(parts["codes"], self.row)
        if codes.numel() and not self.grid.low <= int(codes.min()) <= int(codes.max()) <= self.grid.high:
            raise CheckpointError(
                f"{name}.codes: within {self.grid.low} .. {self.grid.high}, got {int(codes.min())} .. "
                f"{int(codes.max())}. The checkpoint is damaged, or of another grid."
            )
        self.codes.copy_(parts["codes"])
        self.step.copy_(step)


def _words(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _with_codes(
    x: QParameter, codes: Tensor, step: Tensor | None = None, dtype: torch.dtype | None = None, flat: bool = False
) -> QParameter:
    flat |= x.ndim < x.codes.ndim
    made = QParameter(codes, x.step if step is None else step, x.grid, x.row, dtype or x.dtype, flat=flat)
    made.stream = x.stream
    return made


def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return return_and_correct_aliasing(func, args, kwargs, _with_codes(args[0], args[0].codes))


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    return _with_codes(x, x.codes.clone(), step=x.step.clone())


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    """Move the codes; another dtype is another claim, the step stays float32."""
    x, device = args[0], kwargs.get("device")
    codes, step = (t.to(device=device, copy=True) for t in (x.codes, x.step))
    return _with_codes(x, codes, step, kwargs.get("dtype"))


@torch.no_grad()
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    """Take over codes and step, or the nearest codes to floats at the own step."""
    to, source = args[0], args[1]
    if not isinstance(to, QParameter):
        return func(to, source.dequantize(), *args[2:], **kwargs)
    if isinstance(source, QParameter):
        if source.grid != to.grid or source.shape != to.shape or source.step.shape != to.step.shape:
            raise SpecError(f"copy_: {source} does not fit {to}.")
        to.codes.copy_(source.codes)
        to.step.copy_(source.step)
    else:
        to.store_(rounded(source.to(to.device, torch.float32).expand(to.shape) / to.step, to.grid, None))
    return to


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """An ordinary tensor: what optimizers keep beside a parameter."""
    x = args[0]
    kwargs = {"dtype": x.dtype, "device": x.device} | {k: v for k, v in kwargs.items() if v is not None}
    kwargs.pop("memory_format", None)
    return func(torch.empty(x.shape, device="meta", dtype=kwargs["dtype"]), *args[1:], **kwargs)


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """Codes of zero with the same step (`fully_shard` makes room for a shard); other ranks of shape are plain."""
    x: QParameter = args[0]
    size: Any = tuple(args[1])
    if len(size) != x.ndim or size[1:] != tuple(x.shape[1:]):
        return func(torch.empty(0, dtype=x.dtype, device=x.device), *args[1:], **kwargs)
    device = kwargs.get("device") or x.device
    stored = (*size[:-1], x.grid.row_bytes(size[-1])) if len(size) > 1 else (x.grid.row_bytes(size[0]),)
    step = x.step.to(device)
    if x.per_channel:
        step = torch.ones(size[0], *x.step.shape[1:], device=device)
    zero = x.grid.pack(torch.zeros(5, dtype=torch.int8))[0]
    return _with_codes(x, zero.to(device).expand(stored).contiguous(), step)


def _rows(x: QParameter, codes: Tensor, start: int) -> QParameter:
    step = x.step[start : start + codes.shape[0]] if x.per_channel else x.step
    return _with_codes(x, codes, step=step)


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[2] if len(args) > 2 else kwargs.get("dim", 0)
    _only_rows(func, x, dim)
    found, start = [], 0
    for codes in func(x.codes, args[1], 0):
        found.append(_rows(x, codes, start))
        start += codes.shape[0]
    return found


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    given: Any = (*args, *(None, 0, None, None, 1)[len(args) :])
    x, dim, start, end, stride = given
    if start in (None, 0) and (end is None or end >= x.shape[dim]) and stride == 1:
        return return_and_correct_aliasing(func, args, kwargs, _with_codes(x, x.codes))
    _only_rows(func, x, dim)
    made = _rows(x, func(x.codes, 0, start, end, stride), start or 0)
    return return_and_correct_aliasing(func, args, kwargs, made)


def _only_rows(func: Any, x: QParameter, dim: int) -> None:
    if dim % x.ndim or (x.ndim == 1 and x.grid.per_byte > 1):
        raise SpecError(f"{func}: {x} is cut between rows alone, codes of a row share bytes. Call dequantize() first.")


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """The same shape, or flat, which `fully_shard` holds on to; others see the values."""
    x, size = args[0], list(args[1])
    flat = size in ([-1], [x.numel()])
    if not flat and tuple(size) != tuple(x.shape):
        return func(x.dequantize().to(x.dtype), *args[1:], **kwargs)
    return return_and_correct_aliasing(func, args, kwargs, _with_codes(x, x.codes, flat=flat))


def _as_strided(func: Any, args: Any, kwargs: Any) -> Any:
    """The first rows, as they lie: `fully_shard` cuts off what filled up the last rank's."""
    x, size, stride = args[0], tuple(args[1]), tuple(args[2])
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if size[1:] != tuple(x.shape[1:]) or size[0] > x.shape[0] or stride != tuple(x.stride()) or offset:
        raise SpecError(f"{func}: {x} has no other strides. Call dequantize() first.")
    return return_and_correct_aliasing(func, args, kwargs, _rows(x, x.codes[: size[0]], 0))


def _pin(func: Any, args: Any, kwargs: Any) -> Any:
    return _with_codes(args[0], args[0].codes.pin_memory(), step=args[0].step.pin_memory())


_OPERATIONS: dict[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.empty_like.default: _like,
    _aten.zeros_like.default: _like,
    _aten.ones_like.default: _like,
    _aten.full_like.default: _like,
    _aten.new_zeros.default: _new,
    _aten.new_empty.default: _new,
    _aten.split.Tensor: _split,
    _aten.slice.Tensor: _slice,
    _aten.view.default: _view,
    _aten.as_strided.default: _as_strided,
    _aten._pin_memory.default: _pin,
}
