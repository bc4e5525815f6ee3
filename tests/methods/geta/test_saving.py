# SPDX-License-Identifier: Apache-2.0
"""Sub-networks on disk: read back without this library, read back by `transformers`, refused where torn."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbits.errors import CheckpointError, ConversionError
from lowbits.methods import geta
from tests.methods.geta.zoo import example, outputs, random_keep

_READER = """
import sys, torch
folder, given = sys.argv[1:]
assert not any(name.startswith(("lowbits", "transformers")) for name in sys.modules)
program = torch.export.load(folder + "/program.pt2").module()
inputs = torch.load(given)
with torch.no_grad():
    found = program(**inputs)
codes = {name: buffer for name, buffer in program.named_buffers() if name.endswith(".codes")}
torch.save((found if isinstance(found, torch.Tensor) else found["logits"], codes), given)
"""


def prepared(name: str, bits: float = 4) -> tuple[torch.nn.Module, geta.Graph, Tensor]:
    model, graph, _ = example(name)
    model = copy.deepcopy(model)
    geta.quantize_(model, bits=bits)
    return model, graph, random_keep(graph, 3)


@pytest.mark.slow
def test_a_program_runs_in_a_process_without_the_library(tmp_path: Path) -> None:
    """A19: the same numbers, the same integers, at another batch size."""
    model, graph, keep = prepared("vgg")
    small = geta.construct(graph, model, keep)
    geta.save(small, tmp_path / "small", *graph.example)
    inputs = example("vgg").inputs(4)
    torch.save(inputs, tmp_path / "given.pt")
    words = [sys.executable, "-W", "ignore", "-c", _READER, str(tmp_path / "small"), str(tmp_path / "given.pt")]
    subprocess.run(words, check=True, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    found, codes = torch.load(tmp_path / "given.pt")
    torch.testing.assert_close(found, outputs(small, inputs), rtol=1e-5, atol=1e-5)
    mine = {name.removeprefix("network."): b for name, b in small.named_buffers() if name.endswith(".codes")}
    assert codes.keys() == mine.keys() and all(torch.equal(codes[name], mine[name]) for name in codes)
    facts = json.loads((tmp_path / "small" / "subnetwork.json").read_text(encoding="utf-8"))
    assert facts["bits"] == small.bits and facts["kept"] == small.kept and set(facts["containers"].values()) == {4}


@pytest.mark.parametrize("name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "llama"))])
def test_what_was_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model, graph, keep = prepared(name)
    small = geta.construct(graph, model, keep)
    geta.save(small, tmp_path, *graph.example)
    loaded, facts = geta.load(tmp_path)
    inputs = example(name).inputs(4)
    assert torch.equal(outputs(loaded, inputs), outputs(small, inputs)) and facts["of"] == small.full
    with pytest.raises(CheckpointError, match="holds a sub-network already"):
        geta.save(small, tmp_path, *graph.example)
    path = tmp_path / "program.pt2"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="torn sub-network"):
        geta.load(tmp_path)
    with pytest.raises(CheckpointError, match="no sub-network"):
        geta.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["vgg", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "bert", "mixed"))]
)
def test_onnx_computes_the_same_from_packed_integers(name: str, tmp_path: Path) -> None:
    """At another batch size and length than it was exported with."""
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="nothing to run ONNX with")
    model, graph, keep = prepared(name)
    small = geta.construct(graph, model, keep)
    path = tmp_path / "small.onnx"
    geta.save_onnx(small, path, *graph.example)
    inputs = example(name).inputs(4)
    found = runtime.InferenceSession(path).run(None, {key: value.numpy() for key, value in inputs.items()})[0]
    torch.testing.assert_close(torch.from_numpy(found), outputs(small, inputs), rtol=1e-4, atol=1e-5)
    stored = {(bytes(t.raw_data), tuple(t.dims)) for t in pytest.importorskip("onnx").load(path).graph.initializer}
    codes = [b for name, b in small.named_buffers() if name.endswith(".codes")]
    assert codes and all((c.numpy().tobytes(), tuple(c.shape)) in stored for c in codes)
    with pytest.raises(CheckpointError, match="there already"):
        geta.save_onnx(small, path, *graph.example)


def test_onnx_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    model, graph, keep = prepared("vgg")
    small = geta.construct(graph, model, keep)
    with pytest.raises(ConversionError, match="lowbits.onnx"):
        geta.save_onnx(small, tmp_path / "small.onnx", *graph.example)


def uniform(graph: geta.Graph, left: dict[int, int]) -> Tensor:
    """Keep another choice of units in every dimension of a size, as many in each."""
    noise = torch.Generator().manual_seed(0)
    parts = []
    for d in graph.dimensions:
        part = torch.zeros(d.size, dtype=torch.bool)
        part[torch.randperm(d.size, generator=noise)[: left.get(d.size, d.size)]] = True
        parts.append(part)
    return torch.cat(parts)


@pytest.mark.parametrize("name, left", [
    ("llama", {40: 24, 3: 2, 2: 1}), ("gpt2", {96: 32}), ("bert", {40: 17}), ("vit", {40: 17}),
])  # fmt: skip
def test_transformers_loads_what_its_config_can_say(name: str, left: dict[int, int], tmp_path: Path) -> None:
    model, graph, _ = prepared(name)
    keep = uniform(graph, left)
    small = geta.construct(graph, model, keep)
    geta.save_pretrained(small, graph, model, keep, tmp_path)
    again = type(example(name).model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    inputs = example(name).inputs(4)
    torch.testing.assert_close(outputs(again, inputs), outputs(small, inputs), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in example(name).model.parameters())
    if name == "llama":
        assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 2)
        assert again.config.intermediate_size == 24


def test_what_a_config_cannot_say_is_named(tmp_path: Path) -> None:
    model, graph, keep = prepared("llama")
    small = geta.construct(graph, model, keep)
    with pytest.raises(ConversionError, match=r"has \[\d+, 24\] left, but a LlamaConfig can only say"):
        geta.save_pretrained(small, graph, model, keep, tmp_path / "a")
    keep = uniform(graph, {4: 2})  # rotary pairs
    small = geta.construct(graph, model, keep)
    with pytest.raises(ConversionError, match="use geta.save"):
        geta.save_pretrained(small, graph, model, keep, tmp_path / "b")
    plain, graph, keep = prepared("vgg")
    with pytest.raises(ConversionError, match="no transformers config"):
        geta.save_pretrained(geta.construct(graph, plain, keep), graph, plain, keep, tmp_path / "c")
    assert not list(tmp_path.iterdir())
