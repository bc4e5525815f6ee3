# SPDX-License-Identifier: Apache-2.0
"""What formats keep of the noise, storage casts and exported files: B8 to B10 of the specification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError, ConversionError, FormatError, RunError
from lowbits.formats import BF16, E2M1, E2M3, E3M2, E4M3, FloatFormat
from lowbits.methods._pseudo_noise._blocks import to_blocks
from lowbits.methods._pseudo_noise._circuit import Fidelity
from lowbits.methods._pseudo_noise._draw import PseudoNoise, draw
from lowbits.methods._pseudo_noise._export import choose_rungs, ladder_cast, noisy_weights
from lowbits.methods._pseudo_noise._formats import E3M4, E4M7, LADDER, block_cast, rung, to_grid
from lowbits.methods.gaussws import (
    SMALLEST_LADDER,
    Aggregate,
    NoisyWeight,
    Plan,
    Storage,
    add_noise_,
    ladder_,
    ladder_sizes,
    load_ladder,
    noisy,
    save_ladder,
    survival,
)
from lowbits.nn import Recipe, convert_
from tests.oracles import microscaling

N = 1 << 18
# The specification's E4M3 line is that of a format without NaN codes, whose largest number is 480; OCP's ends at 448.
E4M3_480 = FloatFormat("e4m3_480", 4, 3, bias=7)
Cast = Callable[[Tensor, Tensor], Tensor]


def near_the_largest() -> tuple[Tensor, Tensor]:
    """Weights of magnitude M/2 .. M, and M anywhere in a binade; float64."""
    amax = 1 + torch.rand(N, dtype=torch.float64)
    w = amax * (0.5 + 0.5 * torch.rand(N, dtype=torch.float64))
    return torch.where(torch.rand(N) < 0.5, -w, w), amax


def noise(kind: PseudoNoise) -> Tensor:
    return draw(kind, Fidelity.FINE, (16, 16), (32, 32), torch.tensor([1, 2, 3])).double().flatten()


def to_bf16(x: Tensor, _: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def to_format(fmt: FloatFormat) -> Cast:
    return lambda x, amax: block_cast(x.float().unsqueeze(-1), amax.float(), fmt).double().squeeze(-1)


def surviving(cast: Cast, bits: float, r: Tensor, on_grid: bool = False) -> float:
    w, amax = near_the_largest()
    w = cast(w, amax) if on_grid else w
    moved = cast(w + r * amax * 2 ** (1 - bits), amax) != cast(w, amax)
    return float(moved[r != 0].double().mean())


@pytest.mark.parametrize(
    ("bits", "normal", "uniform"),
    [(4, 1.0, 0.97), (5, 1.0, 0.93), (6, 1.0, 0.86), (7, 1.0, 0.73), (8, 1.0, 0.46), (9, 1.0, 0.08), (10, 0.39, 0.0)],
)
def test_b8_survival_in_bfloat16(bits: int, normal: float, uniform: float) -> None:
    """The weights are bfloat16 numbers themselves: what survives is what moves them."""
    assert surviving(to_bf16, bits, noise(PseudoNoise.ROUNDED_NORMAL), True) == pytest.approx(normal, abs=0.01)
    assert surviving(to_bf16, bits, noise(PseudoNoise.UNIFORM), True) == pytest.approx(uniform, abs=0.01)
    if bits <= 8:
        assert surviving(to_bf16, bits, noise(PseudoNoise.ROUNDED_NORMAL), True) >= 0.999


def test_b8_uniform_noise_is_half_lost_at_eight_bits() -> None:
    assert surviving(to_bf16, 8, noise(PseudoNoise.UNIFORM), True) <= 0.5


@pytest.mark.parametrize(
    ("fmt", "shares"),
    [
        (E4M7, (1.000, 0.886, 0.500)),
        (E4M3_480, (0.991, 0.889, 0.498)),
        (E4M3, (0.973, 0.864, 0.485)),  # ours: more clipping, since the top of the binade is NaN
        (E2M3, (0.991, 0.889, 0.498)),
        (E3M4, (0.998, 0.889, 0.497)),
        (E3M2, (0.962, 0.869, 0.487)),
        (E2M1, (0.838, 0.779, 0.446)),
    ],
    ids=lambda value: value.name if isinstance(value, FloatFormat) else None,
)
def test_b9_survival_in_formats(fmt: FloatFormat, shares: tuple[float, ...]) -> None:
    """A unit of noise, +-1, at b = m + 1, m + 2 and m + 3."""
    r = torch.where(torch.rand(N) < 0.5, -1.0, 1.0).double()
    for above, share in enumerate(shares, start=1):
        assert surviving(to_format(fmt), fmt.mantissa_bits + above, r) == pytest.approx(share, abs=0.01)


def test_b9_small_weights_are_seen_without_noise() -> None:
    """Stochastic precision annealing: FP6 and 4 bits leave 68 % of the smallest weights alone, uniform noise 2 %."""
    amax = 1 + torch.rand(N, dtype=torch.float64)
    delta = amax * 2.0**-3
    w = (2 * torch.rand(N, dtype=torch.float64) - 1) * delta / 8
    cast = to_format(E3M2)
    shares = {
        kind: float((cast(w + noise(kind) * delta, amax) == cast(w, amax)).double().mean())
        for kind in (PseudoNoise.ROUNDED_NORMAL, PseudoNoise.UNIFORM)
    }
    assert shares[PseudoNoise.ROUNDED_NORMAL] == pytest.approx(0.684, abs=0.01)
    assert shares[PseudoNoise.UNIFORM] == pytest.approx(0.025, abs=0.01)


@pytest.mark.parametrize(
    ("fmt", "name"), [(E2M1, "fp4_e2m1"), (E2M3, "fp6_e2m3"), (E3M2, "fp6_e3m2"), (E4M3, "fp8_e4m3")]
)
def test_b10_casts_are_microxcalings(fmt: FloatFormat, name: str, shared_data: Path) -> None:
    with np.load(shared_data / "golden" / "mx_microxcaling.npz") as golden:
        x, expected = torch.from_numpy(golden["x"]), torch.from_numpy(golden[f"{name}.block32.floor_scale.round_even"])
    blocks = x.view(64, 4, 32)
    assert torch.equal(block_cast(blocks, blocks.abs().amax(-1), fmt).view(64, 128), expected)


@pytest.mark.parametrize("fmt", [E2M1, E2M3, E3M2, E4M3], ids=lambda fmt: fmt.name)
def test_b10_casts_are_the_oracles(fmt: FloatFormat) -> None:
    x = torch.randn(16, 64) * 10 ** torch.randn(16, 64)
    values, scales = microscaling.quantize(x.double().numpy(), fmt.name, "floor")
    blocks = x.view(16, 2, 32)
    found = block_cast(blocks, blocks.abs().amax(-1), fmt).view(16, 64)
    assert np.array_equal(found.double().numpy(), microscaling.decoded(values, scales))


@pytest.mark.parametrize("fmt", [E2M1, E2M3, E3M2, E4M3], ids=lambda fmt: fmt.name)
def test_b10_casts_are_torchaos(fmt: FloatFormat) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    element = {"e2m1": torch.float4_e2m1fn_x2, "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e4m3": torch.float8_e4m3fn}
    x = torch.randn(16, 64)
    tensor = mx.MXTensor.to_mx(x, element[fmt.name], 32)
    blocks = x.view(16, 2, 32)
    assert torch.equal(block_cast(blocks, blocks.abs().amax(-1), fmt).view(16, 64), tensor.dequantize(torch.float32))


def test_tiny_zero_and_huge_blocks() -> None:
    for amax in (0.0, 1e-45, 1e-38, 2.0**-101, 1.0, 3e38):
        x = torch.tensor([[amax, -amax / 2, 0.0]])
        for fmt in (E2M1, E4M3, E4M7):
            found = block_cast(x, torch.tensor([amax]), fmt)
            assert bool(found.isfinite().all()) and bool((found.abs() <= amax * (1 + 1 / 16)).all())
            if amax >= 2.0**-100:
                assert float((found - x).abs().max()) <= amax / 3


def trained(bits: Tensor | float = 6.0, shape: tuple[int, int] = (70, 100)) -> nn.Module:
    """One layer, partial blocks at its edges, whose blocks have these bits."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0]), nn.LayerNorm(shape[0]))
    convert_(model, Recipe(), verbose=False)
    add_noise_(model, Plan(), seed=0)
    (weight,) = noisy(model)
    assert weight.b_i is not None
    with torch.no_grad():
        weight.b_i.copy_((torch.as_tensor(bits) - 4) / 2)
    return model


def test_the_ladder_follows_the_bits() -> None:
    bits = torch.tensor([[2.0, 3.0, 3.5, 4.0], [4.5, 5.0, 6.0, 6.5], [8.9, 9.0, 9.0, 9.0]])
    model = trained(bits)
    ((_, weight),) = noisy_weights(model).values()
    names = [LADDER[i].name for i in choose_rungs(weight.bits()).flatten()]
    assert names == ["e2m1"] * 2 + ["e3m2"] * 2 + ["e4m3"] * 2 + ["e3m4", "e4m7", "e4m7", "e4m7", "e4m7", "e4m7"]
    assert names == [rung(b).name for b in bits.flatten().tolist()]
    assert {LADDER[i] for i in choose_rungs(weight.bits(), Aggregate.LAYER).flatten()} == {E4M7}
    small = [SMALLEST_LADDER[i].name for i in choose_rungs(weight.bits(), ladder=SMALLEST_LADDER).flatten()]
    assert small == [{"e4m3": "e2m3"}.get(name, name) for name in names]


@pytest.mark.parametrize("ladder", [LADDER, SMALLEST_LADDER, (E3M2,)])
@pytest.mark.parametrize("aggregate", Aggregate)
def test_an_exported_file_holds_what_was_measured(
    tmp_path: Path, aggregate: Aggregate, ladder: tuple[FloatFormat, ...]
) -> None:
    model = trained(torch.rand(3, 4) * 8 + 2)
    path = tmp_path / "model.safetensors"
    length = save_ladder(model, path, aggregate, ladder)
    assert path.stat().st_size == length
    state = load_ladder(path)
    ((w, weight),) = noisy_weights(model).values()
    expected = ladder_cast(w, choose_rungs(weight.bits(), aggregate, ladder), (32, 32), ladder)
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(state["0.weight"], expected) and torch.equal(state["0.bias"], model[0].bias)  # type: ignore[index]
    ladder_(model, aggregate, ladder)
    assert torch.equal(w, expected)
    plain = nn.Sequential(nn.Linear(100, 70), nn.LayerNorm(70))
    assert not any(plain.load_state_dict({name: tensor.float() for name, tensor in state.items()}))


def test_the_bytes_are_true() -> None:
    """A layer of 4096 weights, a quarter of the blocks at 3, 4, 5 and 6 bits: 4, 6, 8 and 8 bits a code."""
    model = trained(torch.tensor([[3.0, 4.0], [5.0, 6.0]]), (64, 64))
    told = {r.format: (r.blocks, r.weights, r.bytes) for r in ladder_sizes(model)}
    assert told == {
        "e2m1": (1, 1024, 512 + 1),
        "e3m2": (1, 1024, 768 + 1),
        "e4m3": (1, 1024, 1024 + 1),
        "e3m4": (1, 1024, 1024 + 1),
        "e4m7": (0, 0, 0),
        "bf16": (0, 0, 0),
    }


def test_the_files_length_is_its_tensors_and_a_header(tmp_path: Path) -> None:
    model = trained(3.0, (1024, 1024))
    length = save_ladder(model, tmp_path / "model.safetensors")
    sizes = {r.format: r.bytes for r in ladder_sizes(model)}
    tensors = sizes["e2m1"] + 1024 // 2 + 1024 * 4 * 3  # rungs; bias and norm in float32
    assert sizes["e2m1"] == 1024 * 1024 // 2 + 1024 and 0 < length - tensors < 1500


def test_what_cannot_be_exported_or_read(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="no weight of this model has noise"):
        save_ladder(nn.Linear(4, 4), tmp_path / "x")
    path = tmp_path / "model.safetensors"
    save_ladder(trained(), path)
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match="is damaged or no export"):
        load_ladder(path)
    with pytest.raises(RunError, match="cannot be written"):
        save_ladder(trained(), tmp_path / "absent" / "model.safetensors")
    broken = trained()
    broken[0].weight.data[0, 0] = torch.nan  # type: ignore[index, union-attr]
    with pytest.raises(FormatError, match=r"0: block \(0, 0\) of its weight is not finite"):
        save_ladder(broken, path)
    from safetensors import safe_open
    from safetensors.torch import save_file

    path.write_bytes(before)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = {**tensors, "0.weight.rungs": tensors["0.weight.rungs"] ^ 4}
    for damaged in (other, {name: t for name, t in tensors.items() if name != "0.weight.codes"}):
        save_file(damaged, path, metadata)
        with pytest.raises(CheckpointError, match=r"is damaged: 0\.weight has \["):
            load_ladder(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is no export of this version"):
        load_ladder(path)


def test_survival_of_a_layer() -> None:
    """6 bits in bfloat16: every unit of noise moves its weight; 68.4 % draw none."""
    weight = NoisyWeight((512, 512), Plan(), seed=0, name="a")
    kept, untouched = survival(torch.randn(512, 512), weight)
    assert kept > 0.999 and untouched == pytest.approx(Fidelity.DEFAULT.probabilities[0], abs=0.005)
    fp4 = NoisyWeight((512, 512), Plan(b_init=3.0, b_target=2.0, storage=Storage.E2M1), seed=0, name="a")
    kept, _ = survival(torch.randn(512, 512), fp4)
    assert 0.5 < kept < 1


def test_a_block_keeps_the_grid_of_its_largest_number() -> None:
    w = torch.randn(64, 64)
    blocks = to_blocks(w, (32, 32))
    q, n = to_grid(blocks, blocks.abs().amax(-1), E3M2)
    assert set(q.unique().tolist()) <= set(E3M2.values().tolist()) and n.dtype == torch.int32
    assert torch.equal(block_cast(w, w.abs(), BF16), w.bfloat16().float())
