# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lowbits.data import HubDataset, StandardLibrary, TextFile, find_source
from lowbits.errors import DataError


def read(spec: str | Path, text_field: str = "text") -> list[str]:
    return list(find_source(spec, text_field).documents())


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)],
)
def test_text_is_read_whole_and_parted_at_the_separator(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(
        compress("\ufeffone é\r\n\n<|endoftext|>\ntwo <|endoftext|> two\n<|endoftext|>\r\nthree\n".encode())
    )
    assert read(path) == ["one é\r\n", "two <|endoftext|> two", "three\n"]


def test_json_lines_and_parquet_and_saved_data_sets_agree(tmp_path: Path) -> None:
    rows = [{"body": "one\n", "n": 1}, {"body": "zwei ü", "n": 2}, {"body": None, "n": 3}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.parquet", "saved"):
        assert read(tmp_path / name, "body") == ["one\n", "zwei ü", ""]
        with pytest.raises(DataError, match="no field 'text', only body, n"):
            read(tmp_path / name)
        with pytest.raises(DataError, match="field 'n' holds int"):
            read(tmp_path / name, "n")
        by_text, by_number = (find_source(tmp_path / name, field).fingerprint() for field in ("body", "n"))
        assert by_text != by_number


def test_a_data_set_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": part, "valid": part}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds the splits train, valid. Name one, for example .*/both/train"):
        read(tmp_path / "both")
    assert read(tmp_path / "both" / "valid") == ["a"]


def test_a_hub_data_set_is_loaded_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(path: str, name: str | None, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        if path == "not/there":
            raise ConnectionError("no such host\nsecond line")
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hf:Salesforce/wikitext/raw-v1:test") == read("hf:owner/name") == ["a"]
    assert asked == [("Salesforce/wikitext", "raw-v1", "test"), ("owner/name", None, "train")]
    with pytest.raises(DataError, match=r"hf:not/there:train: cannot be loaded from the hub \(no such host\)"):
        list(HubDataset("not/there").documents())


def test_a_folder_is_read_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    skipped = ("b/.hidden.txt", ".git/x.txt", "b/__pycache__/x.py", "picture.png", "config.json")
    for name in ("b/1.py", "a.md", "B.rst", *skipped):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "z.jsonl").write_text('{"text": "z"}')
    assert read(tmp_path) == ["B.rst", "a.md", "z", "b/1.py"]
    for name in "qdxambzr":  # no file system happens to list all of these in order
        (tmp_path / "b" / name).mkdir()
        (tmp_path / "b" / name / "text.txt").write_text(name)
    assert read(tmp_path) == ["B.rst", "a.md", "z", "b/1.py", *"abdmqrxz"]
    before = find_source(tmp_path).fingerprint()
    (tmp_path / "b" / "1.py").write_text("other")
    assert find_source(tmp_path).fingerprint() != before


def test_the_standard_library_is_its_modules_without_tests() -> None:
    source = find_source("stdlib")
    assert isinstance(source, StandardLibrary)
    files = [path.relative_to(sysconfig.get_path("stdlib")) for path in source.files()]
    assert len(files) > 300
    assert {Path("argparse.py"), Path("json/decoder.py")} < set(files)
    assert not {"test", "tests", "site-packages", "encodings", "__pycache__"} & {
        part for path in files for part in path.parts
    }
    assert files == [path.relative_to(sysconfig.get_path("stdlib")) for path in source.files()]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0", r"a.txt: binary, not text \(a zero byte at 4\)"),
        ("a.txt", b"1\n<|endoftext|>\nok \xff", r"a.txt: not UTF-8 \(byte 0xff at 19\)"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a.txt.gz: cannot be read \(.*ended.*\)"),
        ("a.txt.xz", b"not xz", r"a.txt.xz: cannot be read \(.*format.*\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl:2: not JSON \("),
        ("a.json", b'[\n{"text": "x"}]', r"a.json:1: not JSON \("),
        ("a.jsonl", b"[1]", r"a.jsonl:1: not a JSON object"),
        ("a.parquet", b"PAR1 not", r"a.parquet: not a readable parquet file \("),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_or_not_allowed_is_named(tmp_path: Path, unprivileged_folder: Path) -> None:
    with pytest.raises(DataError, match="no-such.txt: no such file or folder"):
        find_source("no-such.txt")
    with pytest.raises(DataError, match=r"secret.txt: cannot be read \(Permission denied\)"):
        list(TextFile(unprivileged_folder / "secret.txt").documents())
    with pytest.raises(DataError, match=r"cannot be read \((Permission denied|No such file).*\)"):
        StandardLibrary(unprivileged_folder / "none").files()


def test_an_empty_folder_and_a_library_without_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of a known kind"):
        read(tmp_path)
    with pytest.raises(DataError, match=f"this Python has no .py files in {tmp_path}"):
        list(StandardLibrary(tmp_path).documents())
    assert sys.version.split()[0] in StandardLibrary(tmp_path).name
