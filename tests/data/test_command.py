# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from lowbits.cli.data import main
from lowbits.data import TokenData
from lowbits.errors import LowbitsError, UnknownNameError
from tests.data.made_up import made_up


def test_prepare_and_info_tell_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a[bold].txt").write_text("\n<|endoftext|>\n".join(made_up(60)))
    (tmp_path / "b.jsonl").write_text('{"body": "held out, every word of it"}')
    out = tmp_path / "[out]"
    words = [str(tmp_path / "a[bold].txt"), "--out", str(out), "--validation", str(tmp_path / "b.jsonl")]
    assert main(["prepare", *words, "--text-field", "body", "--vocab-size", "300"]) == 0
    printed = capsys.readouterr()
    assert "reading ..." in printed.err and "encoding ..." in printed.err
    assert main(["info", str(out)]) == 0
    again = capsys.readouterr().out
    assert again == printed.out and all(
        text in again for text in (str(out), "a[bold].txt", "300 tokens", "train", "60")
    )
    assert TokenData.open(out).index.splits["val"].documents == 1


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["prepare", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0 and f"  lowbits data {words[0]} " in capsys.readouterr().out
    assert main(["--help"]) == 0 and main([]) == 2


def test_wrong_words_are_errors_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'data prepare'"):
        main(["prepar"])
    with pytest.raises(LowbitsError, match="no index.json"):
        main(["info", str(tmp_path)])
    with pytest.raises(LowbitsError, match="no such file"):
        main(["prepare", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
