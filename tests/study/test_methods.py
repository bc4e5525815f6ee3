# SPDX-License-Identifier: Apache-2.0
"""Numbers and tables of a method are in report.json and on the page; runs without a method have neither."""

from __future__ import annotations

import json
from pathlib import Path

from lowbits.study import write_report
from tests.study.synthetic import write_comparison, write_run

TABLE = {
    "title": "Bits <by> layer", "columns": ["layer", "mean", "share"], "rows": [["h.0", 4.25, 0.5], ["h.1", None, 1.0]],
    "note": "Darker is more.", "shaded": 1.0,
}  # fmt: skip


DRAWN = TABLE | {"title": "Drawn", "drawing": '<svg class="mine"><text>a lane</text></svg>'}


def told(root: Path) -> Path:
    """A baseline and an arm whose method logs `bits` and leaves a table."""
    arms: list[dict[str, object]] = [
        {"name": "bf16", "role": "baseline", "seeds": [0, 1]}, {"name": "bf16+mine", "role": "recipe", "seeds": [0, 1]}
    ]  # fmt: skip
    write_comparison(root, arms)
    for arm in ("bf16", "bf16+mine"):
        for seed in (0, 1):
            folder = write_run(root, arm, seed, 3.0)
            if arm == "bf16":
                continue
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for line in lines:
                if line["kind"] == "step":
                    line["method"] = {"bits": 6 - seed - line["step"] / 1000}
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps(result | {"tables": [TABLE, DRAWN]}))
    return root


def test_the_report_shows_what_a_method_told(tmp_path: Path) -> None:
    root = told(tmp_path / "x")
    baseline, mine = write_report(root).arms
    assert not baseline.method_curves and not baseline.method_tables
    curve = mine.method_curves["bits"]
    assert curve.mean[0] == (6 + 5) / 2 - curve.step[0] / 1000 and curve.high[0] - curve.low[0] == 1
    assert mine.method_tables == (TABLE, DRAWN)
    page = (root / "report.html").read_text(encoding="utf-8")
    assert 'id="method-bits"' in page and "bf16+mine: Bits &lt;by&gt; layer" in page and "Darker is more." in page
    assert 'style="background:rgba(11,95,165,0.310)">0.5<' in page and ">4.25<" in page
    assert page.count('<svg class="mine"><text>a lane</text></svg>') == 1


def test_no_method_no_section(tmp_path: Path) -> None:
    write_comparison(tmp_path, [{"name": "bf16", "role": "baseline", "seeds": [0]}])
    write_run(tmp_path, "bf16", 0, 3.0)
    write_report(tmp_path)
    assert 'id="methods"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
