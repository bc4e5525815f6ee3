# SPDX-License-Identifier: Apache-2.0
"""The layer of codes and BitNet's, against the papers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from lowbits import recipes
from lowbits.errors import ConversionError, NativeError
from lowbits.formats import E5M2, INT8
from lowbits.nn import Execution, Grid, GridLinear, Packing, StepInit, convert_, grid_linear_, sub_norm_
from lowbits.quantizers import Asymmetric, PerColumn, PerRow, QuantSpec
from tests.oracles import direct_quantized as oracle

GRIDS = [Grid.of(8), Grid.of(4), Grid.of(2), Grid.of(1.58), Grid.of(1.58, Packing.FIVE)]


def layer(grid: Grid = GRIDS[0], init: StepInit | None = None, **options: object) -> GridLinear:
    torch.manual_seed(0)
    return grid_linear_(nn.Linear(40, 24, bias=False), grid, init, **options)  # type: ignore[arg-type]


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(9, 40, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_is_the_paper(grid: Grid) -> None:
    """U7: against float64; three float32 operations follow an exact sum of at most 40 * 127 * 128 < 2^24."""
    net, x = layer(grid), rows()
    want = oracle.linear(x.tolist(), net.weight.unpacked().tolist(), float(net.weight.step))
    assert torch.allclose(net(x).double(), torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("init", [StepInit(), StepInit(per_channel=True)], ids=["tensor", "channel"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integer_units_give_the_same_bits(grid: Grid, init: StepInit) -> None:
    """U7: sums below 2^24 are exact in float32 too."""
    simulated, native = layer(grid, init), layer(grid, init, execution=Execution.NATIVE)
    assert torch.equal(simulated(rows()), native(rows()))
    for count in (1, 17):
        assert torch.equal(simulated(rows()[:1].repeat(count, 1)), native(rows()[:1].repeat(count, 1)))


@pytest.mark.parametrize("init", [StepInit(), StepInit(per_channel=True)], ids=["tensor", "channel"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_are_those_of_the_float_emulation(grid: Grid, init: StepInit) -> None:
    """dX = G W by the activation's identity, dW = G^T x^ with the activation that was multiplied."""
    net, x = layer(grid, init), rows().requires_grad_()
    g = torch.randn(9, 24)
    net(x).backward(g)
    values = net.weight.dequantize()
    sx = (127 / x.detach().double().abs().amax(1, keepdim=True)).float()
    x_hat = (x.detach() * sx).round() * (1 / sx)
    assert torch.allclose(x.grad, g @ values, rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    assert torch.equal(net.weight.grad, g.t() @ x_hat)  # type: ignore[arg-type]


def test_bfloat16_is_the_same_up_to_its_rounding() -> None:
    """H4's bound on a CPU: operands are exact in bfloat16, sums float32, one rounding at the end."""
    net, x = layer(), rows().bfloat16()
    got = net(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, net(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x.float()), got)


@pytest.mark.parametrize("execution", Execution)
def test_tokens_come_in_any_shape(execution: Execution) -> None:
    """Batches, one token, none (an expert that nobody chose), a view that is not contiguous; never a view back."""
    net = layer(execution=execution)
    flat = net(rows())
    for shape in ((3, 3, 40), (9, 1, 40)):
        x = rows().view(shape).requires_grad_()
        y = net(x)
        assert torch.equal(y, flat.view(*shape[:-1], 24)) and not y._is_view()
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
    assert torch.equal(net(rows()[0]), flat[0])
    assert torch.equal(net(rows().t().contiguous().t()), flat)
    empty = torch.zeros(2, 0, 40, requires_grad=True)
    net.zero_grad()
    net(empty).sum().backward()
    assert empty.grad is not None and net.weight.grad is not None and not net.weight.grad.any()


def test_a_token_that_is_not_finite_makes_its_row_not_finite_alone() -> None:
    x = rows()
    x[2, 3], x[4, 5] = float("nan"), float("inf")
    y = layer()(x)
    finite = y.isfinite().all(1)
    assert finite.tolist() == [i not in (2, 4) for i in range(9)]
    assert layer()(torch.zeros(2, 40)).tolist() == torch.zeros(2, 24).tolist()


@pytest.mark.parametrize(
    "gradient", [QuantSpec(E5M2), QuantSpec(INT8, PerRow()), QuantSpec(INT8, PerRow(), Asymmetric())], ids=str
)
@pytest.mark.parametrize("execution", Execution)
def test_rounded_gradients_enter_both_backward_gemms(gradient: QuantSpec, execution: Execution) -> None:
    """FP8 and int8 environments; on integer units dgrad is exact, so both executions agree to float32 rounding."""
    from lowbits.quantizers import quantize

    net, x, g = layer(gradient=gradient, execution=execution), rows().requires_grad_(), torch.randn(9, 24)
    net(x).backward(g)
    g_hat = quantize(g, gradient).dequantize()
    assert torch.allclose(x.grad, g_hat @ net.weight.dequantize(), rtol=1e-5, atol=1e-7)  # type: ignore[arg-type]
    plain = layer()
    plain(rows()).backward(g_hat)
    assert torch.equal(plain.weight.grad, net.weight.grad)  # type: ignore[arg-type]
    empty = torch.zeros(0, 40, requires_grad=True)
    net(empty).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 40)


def test_sums_may_be_as_long_as_int32_allows() -> None:
    """What fills rows up to a multiple of 16 does not count."""
    longest = (2**31 - 1) // 128**2
    for length in (longest - 7, longest + 1):
        net = grid_linear_(nn.Linear(length, 1, bias=False), GRIDS[0], execution=Execution.NATIVE)
        if length <= longest:
            assert net(torch.ones(2, length)).isfinite().all()
        else:
            with pytest.raises(NativeError, match="can overflow"):
                net(torch.ones(2, length))


def test_what_waits_for_backward_is_a_byte_an_activation() -> None:
    net, saved = layer(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(rows().requires_grad_())
    plain = [t for t in saved if type(t) is torch.Tensor]
    assert sorted((t.dtype, t.numel()) for t in plain if t.numel() > 9) == [(torch.int8, 9 * 40)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[3]], ids=str)
def test_a_compiled_layer_gives_the_same_bits(grid: Grid) -> None:
    """The subclass is taken apart by the compiler and put together again."""
    plain, compiled = layer(grid), torch.compile(layer(grid), backend="aot_eager")
    outputs = [net(rows()) for net in (plain, compiled)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs) and torch.equal(plain.weight.grad, compiled.weight.grad)  # type: ignore[arg-type]


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ConversionError, match="nn.Linear is needed, got Embedding"):
        grid_linear_(nn.Embedding(4, 4), GRIDS[0])
    with pytest.raises(NativeError, match="per tensor or per token"):
        layer(gradient=QuantSpec(INT8, PerColumn()))
    model = nn.Sequential(nn.Linear(4, 4))
    convert_(model, lambda *_: recipes.named("w8a8"), verbose=False)
    with pytest.raises(ConversionError, match="follows"):
        grid_linear_(model[0], GRIDS[0])


class Masters(nn.Module):
    """One BitLinear by recipe."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.o_proj = nn.Linear(40, 24, bias=False)
        convert_(self, lambda *_: recipes.named("bitnet_b158"), verbose=False)


def test_bitlinear_is_the_paper() -> None:
    """U8: w_used has the values -g, 0, g; the master's gradient is that of w_used; activations pass theirs on."""
    net, x = Masters(), rows().requires_grad_()
    weight = net.o_proj.weight
    codes, g = oracle.bit_weight(weight.flatten().tolist())
    used = (torch.tensor(codes, dtype=torch.float64) * g).view(24, 40).float()
    y = net.o_proj(x)
    want = oracle.linear(x.tolist(), torch.tensor(codes).view(24, 40).tolist(), g)
    assert torch.allclose(y.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    gradient = torch.randn(9, 24)
    y.backward(gradient)
    sx = 127 / x.detach().abs().amax(1, keepdim=True)
    x_hat = (x.detach() * sx).round() / sx
    assert torch.allclose(weight.grad, gradient.t() @ x_hat, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(x.grad, gradient @ used, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]
    assert weight.dtype == torch.float32 and len(set(codes)) == 3


def test_a_sub_norm_stands_before_the_layer() -> None:
    net, x = Masters(), rows()
    assert sub_norm_(net) == ["o_proj"]
    assert net.state_dict().keys() == {"o_proj.weight", "o_proj.sub_norm.weight"}
    normalized = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()
    sub = net.o_proj(x)
    other = Masters()
    assert torch.allclose(sub, other.o_proj(normalized), rtol=1e-5, atol=1e-5)
    sub.sum().backward()
    assert net.o_proj.sub_norm.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):  # gains are float32: torch would warn
        assert torch.allclose(net.o_proj(x.bfloat16()).float(), sub, rtol=0.02, atol=0.02)
    with pytest.raises(ConversionError, match="already"):
        sub_norm_(net)
    with pytest.raises(ConversionError, match="no linear layers named"):
        sub_norm_(nn.Sequential(nn.Linear(2, 2)))


def test_plain_linear_is_untouched_by_the_oracle() -> None:
    """The oracle itself, against torch, where nothing rounds: codes that are exact and activations on their grid."""
    x = torch.randint(-127, 128, (3, 8), generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = 127
    codes = torch.randint(-1, 2, (4, 8), generator=torch.Generator().manual_seed(1))
    got = oracle.linear(x.tolist(), codes.tolist(), 0.5)
    assert torch.equal(torch.tensor(got, dtype=torch.float64), linear(x, codes.double() * 0.5))
