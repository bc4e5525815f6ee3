# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lowbits import models
from lowbits.cli import main
from lowbits.train import checkpoints

# Frozen: an option that comes, goes or changes its name changes this list, and the CHANGELOG.
OPTIONS = (
    "--out --resume --no-resume "
    "--method --model --data --recipe --quantize-head --no-quantize-head --split-qkv --no-split-qkv "
    "--keep.first --keep.last --keep.names --phases "
    "--steps --batch-size --block --accumulation --dropout --seed "
    "--lr --betas --eps --weight-decay --clip "
    "--curve --warmup --cooldown --final "
    "--device --autocast --compile --no-compile --gradient-checkpointing --no-gradient-checkpointing "
    "--deterministic --no-deterministic "
    "--save-every --keep "
    "--log-every --eval-every --eval-batches --errors-every --max-nonfinite --sinks"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of a run of a second."""
    from tests.train.tiny import tokens

    data = tokens(tmp_path_factory.mktemp("tiny")).folder
    words = f"--data {data} --device cpu --autocast none --steps 2 --batch-size 2 --block 16 --eval-batches 1"
    return ["train", *words.split()]


def _error(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Run a command that has to fail in the agreed way, and return its line."""
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("lowbits: error: ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0].removeprefix("lowbits: error: ")


def test_the_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    shown = re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", text.partition("runs/two")[2])
    assert set(shown) - {"--help"} == set(OPTIONS.split())
    assert "lowbits train --recipe w8a8 --steps 200 --out runs/first" in text
    names = re.sub(r"[\s│]+", " ", text)
    assert all(name.rpartition("-")[2] in names for name in models.SIZES)


def test_a_run_and_its_summary(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*tiny, "--recipe", "w8a8", "--lr", "1e-3", "--curve", "wsd", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    out, _ = capsys.readouterr()
    assert "w8a8: finished after 2 steps" in out and "quantizers off" in out and "sample:" in out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["optimizer"]["lr"], config["schedule"]["curve"], config["recipe"]) == (1e-3, "wsd", "w8a8")
    assert "already holds a run" in _error(capsys, words)
    assert main([*words, "--resume"]) == 0
    assert "its seed is 0, asked for is 1" in _error(capsys, [*words, "--resume", "--seed", "1"])


def test_a_run_file_and_its_exit_codes(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file says what the command line cannot; the command line has the last word on the rest."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import math\nimport torch\nfrom lowbits import models\nfrom lowbits.nn import Recipe\n"
        "from lowbits.train import Run, Watching\n\n"
        "def broken(vocab_size, block):\n    model = models.build('gpt2-nano', vocab_size, block, seed=0)\n"
        "    model.transformer.ln_f.weight.data[0] = math.nan\n    return model\n\n"
        "def run():\n    return Run(model=broken, recipe=Recipe(), steps=9, watching=Watching(max_nonfinite=2))\n"
    )
    assert main(["train", str(file), *tiny[1:], "--out", str(tmp_path / "run")]) == 3
    assert "first in the weight of transformer.ln_f" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["model"].endswith(":broken") and config["steps"] == 2
    file.write_text("x = 1\n")
    assert "defines no function `run`" in _error(capsys, ["train", str(file), "--out", str(tmp_path / "x")])
    assert "there is no run file" in _error(capsys, ["train", str(tmp_path / "absent.py"), "--out", "x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe w8a9", "no recipe is called 'w8a9'; did you mean 'w8a8'"),
        ("--model gpt2-nan", "no model is called 'gpt2-nan'; did you mean 'gpt2-nano'"),
        ("--data /nowhere/at/all", "/nowhere/at/all"),
        ("--batch-size 3 --accumulation 2", "batch-size 3 does not divide into 2 micro-batches"),
        ("--block 1000000", "a block of 1000000 tokens is longer than"),
        ("--split-qkv --model llama-15m", "split-qkv: llama-15m has no fused c_attn layer"),
        ("--keep.last 1.5", "keep.last is a number of blocks (2) or a share of them between 0 and 1 (0.15), got 1.5"),
        ("--keep.first 3 --keep.last 0.5", "keep.first=3 and keep.last=0.5 are 5 blocks, GPT2LMHeadModel has 4"),
        ("--keep.names *.c_atn", "no linear layer of GPT2LMHeadModel is called '*.c_atn'; there are transformer.h."),
        ("--phases 82%", "'82%' is no phase: START:SWITCHES"),
        ("--phases 1:forward=of", "'forward=of' is no switch"),
        ("--phases 7:off", "phase 7:off begins at step 7, the run ends with step 1"),
        ("--phases 1:off 50%:on", "phases 1:off and 50%:on overlap: both begin at step 1"),
        ("--phases 1:off 0:backward=off", "comes after 1:off (step 1). Order them by start"),
        ("--warmup 2", "warmup is a share between 0 and 1, got 2.0"),
    ],
)
def test_bad_input(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in _error(capsys, [*tiny, "--out", str(tmp_path / "run"), *words.split()])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _error(capsys, [*tiny, "--device", "cuda", "--out", str(tmp_path / "run")])
    assert "torch sees no CUDA device here; use --device cpu or auto" in message


def test_an_option_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["train", "--out", "x", "--recpe", "w8a8"])
    assert exited.value.code == 2 and "--recipe" in capsys.readouterr().err


def test_no_write_permission(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permission bits do not stop root, so the refusal is played."""
    real = Path.mkdir

    def refuse(path: Path, *args: object, **words: object) -> None:
        if path.name == "run":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *args, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = _error(capsys, [*tiny, "--out", str(tmp_path / "run")])
    assert message == (
        f"no permission to write {tmp_path / 'run'} (Permission denied); choose another --out or change its owner."
    )


def test_an_output_that_is_a_file(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("precious")
    assert "is a file; choose a folder for --out" in _error(capsys, [*tiny, "--out", str(tmp_path / "run")])
    assert (tmp_path / "run").read_text() == "precious"


def test_models_that_do_not_fit(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vocabulary that is too small, weights that are missing, truncated, or of another shape, too few positions."""
    folder, out = tmp_path / "model", ["--out", str(tmp_path / "run")]
    models.build("gpt2-nano", 104, 16, seed=0).save_pretrained(folder)
    assert "its tokenizer has 300 tokens, the model an embedding of 104" in _error(
        capsys, [*tiny, "--model", str(folder), *out]
    )
    assert "at most 16 tokens, got block 32" in _error(capsys, [*tiny, "--model", str(folder), *out, "--block", "32"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"{folder} cannot be loaded" in _error(capsys, [*tiny, "--model", str(folder), *out])
    weights.unlink()
    assert f"{folder} cannot be loaded" in _error(capsys, [*tiny, "--model", str(folder), *out])
    (folder / "config.json").unlink()
    assert "holds no config.json" in _error(capsys, [*tiny, "--model", str(folder), *out])
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*tiny, "--out", str(out)]) == 0
    (out / "result.json").unlink()
    weights = checkpoints(out / "checkpoints")[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = _error(capsys, [*tiny, "--out", str(out), "--resume"])
    assert "model.safetensors is truncated" in message and "start the run again in another --out" in message


def test_kept_layers_and_phases(tiny: list[str], tmp_path: Path) -> None:
    """`--keep` alone still counts checkpoints."""
    words = "--recipe w8a8 --keep 1 --keep.first 1 --keep.last 0.2 --keep.names *.mlp.c_proj --phases 0:off 50%:on"
    assert main([*tiny, *words.split(), "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["keep"] == {"first": 1, "last": 0.2, "names": ["*.mlp.c_proj"]} and config["saving"]["keep"] == 1
    assert config["phases"] == [
        {"start": 0, "forward": False, "backward": False},
        {"start": 0.5, "forward": True, "backward": True},
    ]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["converted_layers"] == 2 * 3
