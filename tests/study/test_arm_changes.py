# SPDX-License-Identifier: Apache-2.0
"""Arms with kept layers and phases of their own, from the words of a person to the marks on the curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plotly import graph_objects

from lowbits.data import prepare
from lowbits.errors import LowbitsError
from lowbits.nn import Keep, Phase
from lowbits.study import compare
from lowbits.study._changes import changed, parted
from lowbits.study._curves import Curve
from lowbits.study._figures import figures
from lowbits.study._phases import height, marks
from lowbits.study._records import Record
from lowbits.train import Autocast, Compute, Device, Run, Watching
from tests.study.fake_training import tiny_model

SWITCHED, KEPT = "w8a8g8+75%:forward=off", "w8a8g8+keep.last=0.5+keep.names=*.0.mlp.c_proj"


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("w8a8", ("w8a8", "", ())),
        ("w8a8+gaussws", ("w8a8", "gaussws", ())),
        ("w8a8+gaussws,lr=1e+5+7:off", ("w8a8", "gaussws,lr=1e+5", ("7:off",))),
        ("w8a8+keep.first=2+gaussws+0:off+10%:on", ("w8a8", "gaussws", ("keep.first=2", "0:off", "10%:on"))),
    ],
)
def test_a_word_is_parted(word: str, parts: tuple[object, ...]) -> None:
    assert parted(word) == parts


def test_an_arm_changes_what_it_names_and_no_more() -> None:
    base = Run(keep=Keep(first=1, last=2), phases=(Phase(0.5, forward=False),))
    run = changed(base, ("keep.last=0.15", "keep.names=*.a", "keep.names=b"))
    assert run.keep == Keep(first=1, last=0.15, names=("*.a", "b")) and run.phases == base.phases
    run = changed(base, ("0:off", "10%:on"))
    assert run.keep == base.keep and run.phases == (Phase(0, forward=False, backward=False), Phase(0.1))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "w8a8+keep.last=all",
            r"'keep\.last=all' is not known; an arm keeps layers in high precision by",
        ),
        ("w8a8+keep.lost=1", r"'keep\.lost=1' is not known"),
        ("w8a8+keep.last=1.5", r"keep\.last is a number of blocks"),
        ("w8a8+82%:forward=of", r"'forward=of' is no switch"),
        ("w8a8+9999:off", r"phase 9999:off begins at step 9999, the run ends with step 399"),
        ("w8a8+5:off+2:on", r"Order them by start"),
        ("w8a8+forward=off", r"no method is called 'forward=off'"),
        ("w8a8+82%", r"no recipe is called 'w8a8\+82%'"),
        ("w8a8+keep.names=a* w8a8+keep.names=a?", r"would share the folder w8a8\+keep\.names=a_"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(word: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LowbitsError, match=message):
        compare(["bf16", *word.split()], [0], Run(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_comparison_of_the_recipe_its_phases_and_its_kept_layers(tmp_path: Path) -> None:
    """The real trainer; each arm is in its own folder, in report.json and on the curves as what it is."""
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"line {i}, {i * i % 97}" for i in range(2000)))
    prepare(str(tmp_path / "text.txt"), tmp_path / "tokens", vocab_size=300)
    watching = Watching(log_every=1, eval_every=2, eval_batches=1, errors_every=4)
    compute = Compute(device=Device.CPU, autocast=Autocast.NONE)
    base = Run(
        model=tiny_model, data=str(tmp_path / "tokens"), steps=8, batch_size=2, block=16, compute=compute,
        watching=watching,
    )  # fmt: skip
    out = tmp_path / "out"
    summary = compare(["bf16", "w8a8g8", SWITCHED, KEPT], [0], base, out, jobs=2)
    arms = {arm.name: arm for arm in summary.arms}
    assert [arm.status for arm in summary.arms] == ["1 of 1 finished"] * 4
    folders = {name: f"{name.replace('%', 'pct').replace(':', '-').replace('*', '_')}/seed-0" for name in arms}
    configs = {name: json.loads((out / folder / "config.json").read_text()) for name, folder in folders.items()}
    assert configs[SWITCHED]["phases"] == [{"start": 0.75, "forward": False, "backward": True}]
    assert configs[KEPT]["keep"] == {"first": 0, "last": 0.5, "names": ["*.0.mlp.c_proj"]}
    assert configs["w8a8g8"]["phases"] == [] and arms["w8a8g8"].phases == ()
    assert [arms[name].converted_layers for name in ("w8a8g8", SWITCHED, KEPT)] == [8, 8, 3]
    assert arms[SWITCHED].quantizes.endswith("; from 75% on forward in high precision, backward quantized")
    assert arms[KEPT].quantizes.endswith("; high precision: last 50 % of the blocks, *.0.mlp.c_proj")
    # Until its phase begins an arm is the recipe itself; a phase is no trouble.
    first, second = (arms[name].validation for name in ("w8a8g8", SWITCHED))
    assert first.mean[:3] == second.mean[:3] and first.mean[3] != second.mean[3]
    assert arms[SWITCHED].runs[0].events == ()
    (mark,) = arms[SWITCHED].phases
    assert (mark.step, mark.tokens) == (6, 6 * 2 * 16)
    assert mark.words == "forward in high precision, backward quantized, from this step on"
    for name in ("validation", "training", "gap-curve"):
        (trace,) = (t for t in figures(summary)[name]["data"] if t["mode"] == "markers")
        assert trace["meta"] == SWITCHED and trace["x"] == [192.0] and trace["text"] == [f"after step 6: {mark.words}"]
        graph_objects.Scatter(trace)  # raises on any property that plotly does not know
    assert "after step 6: forward in high precision" in (out / "report.html").read_text()
    assert configs == {
        name: json.loads((out / arms[name].runs[0].directory / "config.json").read_text()) for name in arms
    }
    again = compare(["bf16", "w8a8g8", SWITCHED, KEPT], [0], base, out, jobs=2)
    assert again.arms == summary.arms


def test_marks_lie_on_the_curve() -> None:
    curve = Curve(step=(10, 20), tokens=(100, 200), mean=(4.0, 3.0), low=(4.0, 3.0), high=(4.0, 3.0))
    assert [height(curve, tokens) for tokens in (0, 100, 125, 200, 300)] == [4.0, 4.0, 3.75, 3.0, 3.0]
    event = {"kind": "event", "event": "phase", "message": "x"}
    begun = Record(Path("x"), 0, "finished", steps=({"step": 10, "tokens": 100},), events=({**event, "step": 4},))
    assert [(mark.step, mark.tokens) for mark in marks([Record(Path("y"), 1, "missing"), begun])] == [(3, 30.0)]
    assert marks([]) == ()
