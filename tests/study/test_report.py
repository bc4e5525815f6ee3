# SPDX-License-Identifier: Apache-2.0
"""The page: self-contained, valid, and right in a browser at desktop and phone width."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lowbits.errors import RunError
from lowbits.study import print_summary, summarize, write_report
from tests.study.synthetic import example, write_comparison, write_run


class Page(HTMLParser):
    """Collect what a browser would fetch, the text, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = example(tmp_path_factory.mktemp("runs") / "x")
    write_report(root)
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_fetched(page: Page) -> None:
    assert page.links and all(link.startswith(("#", "data:,")) for link in page.links)
    assert len(page.scripts) == 3 and "@import" not in page.scripts[2]


def test_all_that_was_asked_for_is_on_the_page(page: Page) -> None:
    text = re.sub(r"\s+", " ", " ".join(page.words))
    for words in (
        "No difference seen from bf16: w8a8.",
        "cannot be told from chance",
        "+0.1013 ± 0.0044",
        "+18.8",
        "not reached, 0.0918 nats short",
        "Simulated",
        "at step 230, first in transformer.h.0.attn.c_attn (grad)",
        "killed by signal 9",
        "7.2 MB → 1.8 MB",
        "I/O operation on <closed> </script> file & more",
        "lowbits compare bf16 null w8a8",
        "2.13.0",
    ):
        assert words in text, words


def test_figures_are_valid_plotly(page: Page) -> None:
    import plotly.graph_objects as go

    figures = json.loads(page.scripts[1])
    assert set(figures) == {
        "gaps", "validation", "training", "gap-curve", "memory", "errors-weight", "errors-input", "errors-grad",
        "history-weight", "history-input", "history-grad",
    }  # fmt: skip
    for figure in figures.values():
        go.Figure(figure)  # raises on any property that plotly does not know
    dots = {trace["meta"]: trace["x"][0] for trace in figures["gaps"]["data"] if "error_x" in trace}
    assert dots["w4_tensor"] == pytest.approx(0.10133, abs=1e-4)
    (shape, *_) = figures["gaps"]["layout"]["shapes"]
    assert -shape["x0"] == shape["x1"] == pytest.approx(summarize_noise(page))


def summarize_noise(page: Page) -> float:
    """The gap that is sure over all comparisons, as the headline says it."""
    found = re.search(r"only one above ([\d.]+) is sure", " ".join(page.words))
    assert found
    return pytest.approx(float(found[1]), abs=1e-4)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "runs",
    [
        [("bf16", 0, 3.0)],
        [("bf16", 0, 3.0), ("w8a8", 0, 3.1)],
        [("bf16", 0, None), ("w8a8", 0, None)],
        [("bf16", 0, None), ("w8a8", 0, 3.1)],
        [],
    ],
    ids=["alone", "one seed", "none finished", "no baseline", "none begun"],
)
def test_half_a_comparison_is_shown_as_far_as_it_goes(
    tmp_path: Path, runs: list[tuple[str, int, float | None]]
) -> None:
    write_comparison(tmp_path, [{"name": name, "seeds": [0]} for name in ("bf16", "w8a8")[: len(runs) or 2]])
    for name, seed, final in runs:
        write_run(tmp_path, name, seed, final)
    summary = write_report(tmp_path)
    assert "Quality" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    screen = StringIO()
    print_summary(summary, Console(file=screen, width=120))
    assert "bf16" in screen.getvalue()


def test_the_table_says_it_all(folder: Path) -> None:
    screen = StringIO()
    print_summary(summarize(folder), Console(file=screen, width=140))
    rows = {line.split()[0]: line for line in reversed(screen.getvalue().splitlines()) if line.strip()}
    assert "no difference seen" in rows["w8a8"] and "3.1030 ± 0.0046" in rows["w8a8"]
    assert "2 of 3 runs diverged" in rows["g4_tensor"]
    assert screen.getvalue().count(" writes:") == 2


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "bf16", 0, 3.0)
    (tmp_path / "report.json").mkdir()
    with pytest.raises(RunError, match=r"report\.json cannot be written"):
        write_report(tmp_path)


_PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll(".chart svg.main-svg")].filter(
    (svg) => svg.getBoundingClientRect().right > innerWidth + 0.5).length;
  document.querySelector('[data-metric="zero"]').click();
  document.querySelector('[data-arm="w8a8"]').click();
  document.querySelector('[data-history="g4_tensor"]').click();
  const shown = document.getElementById("errors-weight").data.filter((t) => t.visible === true).map((t) => t.meta);
  const history = document.getElementById("history-grad").data.filter((t) => t.visible === true).map((t) => t.meta);
  const hidden = document.getElementById("validation").data.filter((t) => t.visible === false).length;
  console.log("PROBE" + JSON.stringify({ width: innerWidth, needs: document.documentElement.scrollWidth, wide,
    drawn: Number(document.documentElement.dataset.drawn), shown, history, hidden }) + "EBORP");
}, 500))</script></body>"""


def test_in_a_browser_at_desktop_and_phone_width(folder: Path, tmp_path: Path) -> None:
    """Both widths as frames of one page: a headless window is never narrower than 500 pixels."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium found; install it to look at the report in a browser")
    html = (folder / "report.html").read_text(encoding="utf-8")
    (tmp_path / "probed.html").write_text(html.replace("</body>", _PROBE), encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" style="width:{w}px;height:2400px;border:0"></iframe>' for w in (1400, 390)
    )
    (tmp_path / "frames.html").write_text(
        f'<!doctype html><body style="margin:0;width:1800px">{frames}', encoding="utf-8"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--window-size=1800,2400"]
    shot = tmp_path / "shot.png"
    command = [chromium, *flags, f"--screenshot={shot}", (tmp_path / "frames.html").as_uri()]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr
    found = [json.loads(text.replace('\\"', '"')) for text in re.findall(r"PROBE(.*?)EBORP", said)]
    assert sorted(probe["width"] for probe in found) == [390, 1400], said
    console = [line for line in said.splitlines() if ":CONSOLE" in line and "PROBE" not in line]
    assert not console, "\n".join(console)
    for probe in found:
        assert probe["needs"] <= probe["width"] and probe["wide"] == 0, probe
        assert probe["history"] == ["g4_tensor|zero"] * 2, probe
        assert probe["drawn"] == 11 and probe["shown"] == ["zero"] and probe["hidden"] == 2, probe
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (1800, 2400) and shot.stat().st_size > 100_000
