# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import resource
import sysconfig
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from lowbits.data import StandardLibrary, TextFile, TokenData, _shards, prepare
from lowbits.errors import DataError, LowbitsError, RunError
from tests.data.made_up import Memory, made_up

TEXT = made_up(60)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_standard_library_is_split_by_file(tmp_path: Path, quiet: Console) -> None:
    library = StandardLibrary(Path(sysconfig.get_path("stdlib"), "email"))
    modules = {path.read_text(encoding="utf-8") for path in library.files()} - {""}
    data = prepare(library, tmp_path / "out", vocab_size=512, val_fraction=0.3, console=quiet)
    decoded = {}
    for split, facts in data.index.splits.items():
        tokens = np.concatenate([np.fromfile(data.folder / shard.file, "<u2") for shard in facts.shards])
        decoded[split] = set(data.tokenizer().decode(tokens.tolist()).split("<|endoftext|>")) - {""}
    assert decoded["train"] | decoded["val"] == modules and not decoded["train"] & decoded["val"]
    assert min(len(side) for side in decoded.values()) > 1
    assert data.bytes_per_token("val") > 1.8 and data.vocab_size == 512


def test_the_same_request_gives_the_same_bytes(tmp_path: Path, quiet: Console) -> None:
    folders = [prepare(Memory(TEXT), tmp_path / name, vocab_size=300, console=quiet).folder for name in "ab"]
    assert files(folders[0]) == files(folders[1])
    assert set(os.listdir(tmp_path)) == {"a", "b"}  # nothing was left beside them
    assert AutoTokenizer.from_pretrained(folders[0]).eos_token_id == 0


def test_asking_again_says_so_and_asking_for_something_else_is_refused(tmp_path: Path) -> None:
    out, said = tmp_path / "out", StringIO()
    console = Console(file=said)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(TEXT))
    data = prepare(path, out, vocab_size=300, console=console)
    before = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    assert "training a tokenizer ..." in said.getvalue() and "nothing to do" not in said.getvalue()
    again = prepare([TextFile(path)], out, vocab_size=300, console=console)
    assert "this data is there already, nothing to do" in said.getvalue()
    assert again.fingerprint == data.fingerprint
    for options, key in (({"vocab_size": 301}, "tokenizer"), ({"vocab_size": 300, "val_fraction": 0.1}, "validation")):
        with pytest.raises(RunError, match=rf"another request \(differs in: {key}\). Choose another folder"):
            prepare(path, out, **options, console=console)  # pyright: ignore[reportArgumentType]
    path.write_text("\n".join([*TEXT, "more"]))
    with pytest.raises(RunError, match="differs in: training"):
        prepare(path, out, vocab_size=300, console=console)
    assert {name: (out / name).stat().st_mtime_ns for name in files(out)} == before


def test_a_given_tokenizer_is_used_and_its_size_decides_the_width(
    tmp_path: Path, quiet: Console, prepared: TokenData
) -> None:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "?": 1, "end": 70_399}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    small = prepare(Memory(TEXT), tmp_path / "small", tokenizer=prepared.folder, console=quiet)
    large = prepare(Memory(["the end", *TEXT]), tmp_path / "wide", tokenizer=tmp_path / "tokenizer.json", console=quiet)
    assert (small.index.dtype, small.vocab_size) == ("uint16", 400)
    assert (large.index.dtype, large.vocab_size) == ("uint32", 70_400)
    rows = large.batch("train", 0, batch_size=large.windows("train", 2), block=2, seed=0)
    assert sorted(set(rows.flatten().tolist())) == [0, 1, 70_399]
    assert prepared.tokenizer().decode(next(small.val_batches(1, 30))[0]).split(".")[0] in " ".join(TEXT)


def test_given_validation_text_is_never_trained_on(tmp_path: Path, quiet: Console) -> None:
    held_out = made_up(5, seed=9)
    data = prepare(
        [Memory(TEXT), Memory([text + "\n" for text in held_out])],
        tmp_path / "out",
        validation=Memory(held_out),
        vocab_size=300,
        console=quiet,
    )
    assert {name: split.documents for name, split in data.index.splits.items()} == {"train": 60, "val": 5}
    assert data.index.duplicates == 5 and data.index.sources == ("memory",) * 3
    assert sum(len(text.encode()) for text in held_out) == data.index.splits["val"].bytes


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path, quiet: Console) -> None:
    odd = ["qqqqqqqq zzzzzzzz " * 500]
    with_odd = prepare(Memory(TEXT), tmp_path / "a", validation=Memory(odd), vocab_size=300, console=quiet)
    assert "zz" not in with_odd.tokenizer().get_vocab()
    assert "zz" in prepare(Memory([*TEXT, *odd]), tmp_path / "b", vocab_size=300, console=quiet).tokenizer().get_vocab()


def test_a_terminal_sees_a_bar_for_each_stage(tmp_path: Path) -> None:
    seen = StringIO()
    prepare(Memory(TEXT), tmp_path / "out", vocab_size=300, console=Console(file=seen, force_terminal=True))
    assert all(stage in seen.getvalue() for stage in ("reading", "training a tokenizer", "encoding", "━"))


def test_little_text_of_much_is_spread_over_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbits.data import _prepare, _tokenizer

    monkeypatch.setattr(_tokenizer, "_PIECE", 50)
    kept = "".join(_prepare._sample(iter(TEXT), 0.25, lambda size: None))
    assert 0.2 < len(kept) / len("".join(TEXT)) < 0.3
    assert "".join(_prepare._sample(iter(TEXT), 1.0, lambda size: None)) == "".join(TEXT)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no sources. Name a file"),
        (["x"], {}, "val: zero tokens, 1 distinct documents do not fill both sides"),
        ([""], {}, "memory: empty, there is no text in it"),
        (TEXT, {"vocab_size": 256}, "vocab_size: at least 257"),
        (TEXT, {"val_fraction": 0.0}, "val_fraction: a share above 0 and up to 0.5, got 0.0"),
        (TEXT, {"val_fraction": 0.6}, "val_fraction: a share above 0"),
        (TEXT, {"tokenizer": "./nowhere"}, "nowhere: no such tokenizer"),
        (TEXT, {"validation": "./nowhere.txt"}, "nowhere.txt: no such file or folder"),
        (TEXT, {"validation": Memory(TEXT)}, "train: zero tokens"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing_behind(
    tmp_path: Path, quiet: Console, sources: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare([Memory(sources)] if sources else [], tmp_path / "out", **options, console=quiet)  # pyright: ignore[reportArgumentType]
    assert os.listdir(tmp_path) == [] and "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, quiet: Console) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(RunError, match="exists and holds no token data. Choose another folder for --out"):
            prepare(Memory(TEXT), out, console=quiet)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert prepare(Memory(TEXT), tmp_path / "empty", vocab_size=300, console=quiet).tokens("val") > 0


def test_a_folder_that_cannot_be_written_is_named_before_the_text_is_read(
    unprivileged_folder: Path, quiet: Console
) -> None:
    unread = Memory([], before=lambda: pytest.fail("the source was read"))
    with pytest.raises(RunError, match=r"locked/out: cannot be written \(Permission denied\). Choose a folder"):
        prepare(unread, unprivileged_folder / "out", console=quiet)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Let no file grow beyond 3,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("documents", [3, 300])  # the tokenizer does not fit, or the first shard does not
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, quiet: Console, documents: int) -> None:
    with pytest.raises(RunError, match=r"out: cannot be written \(File too large.*on a disk with space"):
        prepare(Memory(made_up(documents)), tmp_path / "out", vocab_size=300, console=quiet)
    assert os.listdir(tmp_path) == []


def test_the_slower_of_two_equal_processes_uses_what_the_faster_wrote(tmp_path: Path, quiet: Console) -> None:
    def other_process(words: list[str]) -> None:
        prepare(Memory(words), tmp_path / "out", vocab_size=300, console=quiet)

    slow = Memory(TEXT, before=lambda: other_process(TEXT))
    assert prepare(slow, tmp_path / "out", vocab_size=300, console=quiet).tokens("train") > 0
    slow = Memory(TEXT, before=lambda: other_process(TEXT[1:]))
    (tmp_path / "out").rename(tmp_path / "first")
    with pytest.raises(LowbitsError, match="another request"):
        prepare(slow, tmp_path / "out", vocab_size=300, console=quiet)
    assert sorted(os.listdir(tmp_path)) == ["first", "out"]


def test_shards_are_bounded_and_recorded(prepared: TokenData) -> None:
    for split in prepared.index.splits.values():
        assert all(shard.tokens == 1000 for shard in split.shards[:-1]) and 0 < split.shards[-1].tokens <= 1000
        assert sum(shard.tokens for shard in split.shards) == split.tokens
    assert _shards.SHARD_TOKENS == 1 << 27
    assert json.loads((prepared.folder / "index.json").read_text())["version"] == 1
