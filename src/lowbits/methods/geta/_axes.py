# SPDX-License-Identifier: Apache-2.0
"""What an axis of a tensor is made of: atoms, products and concatenations of atoms, and which axes are one.

An axis starts as an atom. A reshape makes it a product (heads times head_dim), a split makes it a concatenation
(query, key, value); an atom may be refined so at any time, and every axis that it is part of follows. Two axes that an
operator needs to be equal are unified. What is left when the whole graph was read are the leaves: each is a set of
slices that can be kept or cut one by one.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Kind(enum.Enum):
    """Structure of an axis: none, row-major product of factors, concatenation of segments."""

    ATOM = enum.auto()
    PRODUCT = enum.auto()
    CONCATENATION = enum.auto()


class IncompatibleError(Exception):
    """Two axes whose structures have no common refinement."""


class Axis:
    """A node of the union-find forest over axes; ask `find` for its representative before looking at it."""

    __slots__ = ("fixed", "kind", "parent", "parts", "size")

    def __init__(self, size: int, kind: Kind = Kind.ATOM, parts: tuple[Axis, ...] = ()) -> None:
        self.size, self.kind, self.parts = size, kind, parts
        self.parent: Axis | None = None
        self.fixed: str | None = None

    def find(self) -> Axis:
        """Return the representative, and shorten the way to it."""
        root = self
        while root.parent is not None:
            root = root.parent
        node = self
        while node.parent is not None:
            node.parent, node = root, node.parent
        return root

    def refine(self, kind: Kind, parts: Sequence[Axis]) -> None:
        """Give structure to an atom."""
        self.kind, self.parts = kind, tuple(parts)
        if self.fixed is not None:
            for part in parts:
                fix(part, self.fixed)


def product(parts: Sequence[Axis]) -> Axis:
    """Return the row-major product, outermost factor first; factors of size 1 say nothing."""
    flat = [factor for part in parts for factor in factors(part)]
    if len(flat) == 1:
        return flat[0]
    return Axis(math.prod(part.size for part in flat), Kind.PRODUCT, tuple(flat)) if flat else Axis(1)


def concatenation(parts: Sequence[Axis]) -> Axis:
    """Return the concatenation, first segment first."""
    flat = [segment for part in parts for segment in segments(part)]
    if len(flat) == 1:
        return flat[0]
    return Axis(sum(part.size for part in flat), Kind.CONCATENATION, tuple(flat))


def factors(axis: Axis) -> list[Axis]:
    """Return the factors of an axis, outermost first, those of size 1 left out."""
    axis = axis.find()
    if axis.kind is Kind.PRODUCT:
        return [factor for part in axis.parts for factor in factors(part)]
    return [axis] if axis.size > 1 else []


def segments(axis: Axis) -> list[Axis]:
    """Return the segments of an axis; a product whose outermost factor is a concatenation has segments, too."""
    axis = axis.find()
    if axis.kind is Kind.CONCATENATION:
        return [segment for part in axis.parts for segment in segments(part)]
    if axis.kind is Kind.PRODUCT and len(outer := segments(factors(axis)[0])) > 1:
        inner = factors(axis)[1:]
        return [product([segment, *inner]) for segment in outer]
    return [axis] if axis.size else []


def leaves(axis: Axis) -> list[Axis]:
    """Return the atoms that an axis is made of, each once, in order."""
    axis = axis.find()
    if axis.kind is Kind.ATOM:
        return [axis]
    return list(dict.fromkeys(leaf for part in axis.parts for leaf in leaves(part)))


def fix(axis: Axis, reason: str) -> None:
    """Say why no slice of an axis can be cut; the first reason stays."""
    for leaf in leaves(axis):
        leaf.fixed = leaf.fixed or reason


def unify(a: Axis, b: Axis, reason: str) -> None:
    """Make two axes one; where their structures have no common refinement, fix both.

    Args:
        a: an axis.
        b: an axis of the same size.
        reason: what needs them to be equal, for the report.
    """
    try:
        _unify(a, b)
    except IncompatibleError:
        for axis in (a, b):
            fix(axis, f"{reason}: its axes are cut up in ways that do not fit together")


def _unify(a: Axis, b: Axis) -> None:
    a, b = a.find(), b.find()
    if a is b or a.size <= 1:
        return
    if a.kind is not Kind.ATOM and b.kind is Kind.ATOM:
        a, b = b, a
    if a.kind is Kind.ATOM:
        a.parent = b
        if a.fixed is not None:
            fix(b, a.fixed)
        return
    cut = len(segments(a)) > 1 or len(segments(b)) > 1
    pairs = _common_segments(a, b) if cut else _common_factors(a, b)
    for one, other in pairs:
        _unify(one, other)
    a, b = a.find(), b.find()
    if a is not b:
        a.parent = b


def _common_segments(a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
    cuts = sorted({cut for axis in (a, b) for cut in itertools.accumulate(part.size for part in segments(axis))})
    pieces = [_cut(axis, cuts[:-1]) for axis in (a, b)]
    return list(zip(*pieces, strict=True))


def _cut(axis: Axis, cuts: Sequence[int]) -> list[Axis]:
    """Return the pieces of an axis between given places."""
    pieces, begin, rest = [], 0, axis
    for place in cuts:
        piece, rest = split(rest, place - begin)
        pieces.append(piece)
        begin = place
    return [*pieces, rest]


def split(axis: Axis, place: int) -> tuple[Axis, Axis]:
    """Return what stands before and after a place within an axis.

    Raises:
        IncompatibleError: the place is within a factor that cannot be cut there.
    """
    axis = axis.find()
    if axis.kind is Kind.ATOM:
        halves = Axis(place), Axis(axis.size - place)
        axis.refine(Kind.CONCATENATION, halves)
        return halves
    parts = segments(axis)
    if len(parts) == 1:
        return _split_product(axis, place)
    before: list[Axis] = []
    for index, part in enumerate(parts):
        if place == 0:
            return concatenation(before), concatenation(parts[index:])
        if part.size > place:
            left, right = split(part, place)
            return concatenation([*before, left]), concatenation([right, *parts[index + 1 :]])
        before.append(part)
        place -= part.size
    raise IncompatibleError


def _split_product(axis: Axis, place: int) -> tuple[Axis, Axis]:
    """Cut the outermost factor; inner factors are taken in as far as the place is a multiple of them."""
    parts = factors(axis)
    inner = math.prod(part.size for part in parts[1:])
    if common := place % inner:
        # The place lies within one index of the outermost factor: possible if the rest can be regrouped.
        raise IncompatibleError(f"{common} of {inner}")
    left, right = split(parts[0], place // inner)
    return product([left, *parts[1:]]), product([right, *parts[1:]])


def _common_factors(a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
    left, right, pairs = factors(a), factors(b), []
    while left and right:
        x, y = left.pop(), right.pop()
        if x.size > y.size:
            outer, x = _factor(x, y.size)
            left.append(outer)
        elif y.size > x.size:
            outer, y = _factor(y, x.size)
            right.append(outer)
        pairs.append((x, y))
    return pairs


def _factor(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """Return the outer and the inner factor of an axis, the inner one of a given size."""
    axis = axis.find()
    if axis.size % inner:
        raise IncompatibleError
    if axis.kind is Kind.ATOM:
        halves = Axis(axis.size // inner), Axis(inner)
        axis.refine(Kind.PRODUCT, halves)
        return halves
    if axis.kind is Kind.PRODUCT:  # it became one while its neighbours were refined
        halves = Axis(axis.size // inner), Axis(inner)
        _unify(axis, product(halves))
        return halves
    shared, outers = Axis(inner), []
    for part in segments(axis):
        if part.size % inner:
            raise IncompatibleError
        fresh = Axis(part.size // inner)
        _unify(part, product([fresh, shared]))
        outers.append(fresh)
    return concatenation(outers), shared


def kept(axis: Axis, keep: dict[Axis, Tensor]) -> Tensor:
    """Return which indices of an axis are kept.

    Args:
        axis: any.
        keep: bool mask of every leaf that is cut; others are kept whole.
    Returns:
        bool `[size]`; an index of a product is kept if all its factors' are.
    """
    axis = axis.find()
    if axis.kind is Kind.ATOM:
        mask = keep.get(axis)
        return torch.ones(axis.size, dtype=torch.bool) if mask is None else mask
    parts = [kept(part, keep) for part in axis.parts]
    if axis.kind is Kind.CONCATENATION:
        return torch.cat(parts)
    mask = parts[0]
    for part in parts[1:]:
        mask = (mask[:, None] & part).reshape(-1)
    return mask


def index_of(axis: Axis, leaf: Axis) -> Tensor:
    """Return which index of a leaf each index of an axis belongs to.

    Args:
        axis: any.
        leaf: one of its leaves.
    Returns:
        int64 `[size]`, -1 where the leaf has no part in it.
    """
    axis = axis.find()
    if axis.kind is Kind.ATOM:
        return torch.arange(axis.size) if axis is leaf else torch.full((axis.size,), -1)
    parts = [index_of(part, leaf) for part in axis.parts]
    if axis.kind is Kind.CONCATENATION:
        return torch.cat(parts)
    index = parts[0]
    for part in parts[1:]:
        index = torch.maximum(index[:, None], part).reshape(-1)
    return index
