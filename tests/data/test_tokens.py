# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.data import TokenData, check_vocabulary
from lowbits.errors import DataError, LowbitsError, UnknownNameError

BLOCK = 16


def stream(data: TokenData, split: str) -> np.ndarray:
    """Read all shards of a split as plain files."""
    parts = [np.fromfile(data.folder / shard.file, "<u2") for shard in data.index.splits[split].shards]
    return np.concatenate(parts)


@given(step=st.integers(0, 2000), share=st.integers(1, 5), world=st.integers(1, 4), seed=st.integers(0, 99))
def test_ranks_read_slices_of_one_batch(prepared: TokenData, step: int, share: int, world: int, seed: int) -> None:
    size = share * world
    whole = prepared.batch("train", step, batch_size=size, block=BLOCK, seed=seed)
    parts = [
        prepared.batch("train", step, batch_size=size, block=BLOCK, seed=seed, rank=rank, world=world)
        for rank in range(world)
    ]
    assert whole.shape == (size, BLOCK) and whole.dtype == torch.int64
    assert torch.equal(whole, torch.cat(parts))


@given(block=st.integers(2, 1500), seed=st.integers(0, 9))
def test_an_epoch_reads_every_token_once_also_across_shards(prepared: TokenData, block: int, seed: int) -> None:
    windows = prepared.windows("train", block)
    rows = prepared.batch("train", 0, batch_size=windows, block=block, seed=seed).numpy()
    tokens = stream(prepared, "train")
    assert len(prepared.index.splits["train"].shards) > 3 and windows == len(tokens) // block
    expected = tokens[: windows * block].reshape(windows, block)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))


def test_validation_is_read_in_order_and_up_to_the_limit(prepared: TokenData) -> None:
    tokens, windows = stream(prepared, "val"), prepared.windows("val", BLOCK)
    batches = list(prepared.val_batches(5, BLOCK))
    assert torch.cat(batches).flatten().tolist() == tokens[: windows * BLOCK].tolist()
    assert {len(batch) for batch in batches[:-1]} == {5} and 1 <= len(batches[-1]) <= 5
    few = torch.cat(list(prepared.val_batches(5, BLOCK, limit=7)))
    assert len(few) == 7 and torch.equal(few, torch.cat(batches)[:7])


def test_tokens_decode_to_the_text_that_was_given(prepared: TokenData) -> None:
    tokenizer = prepared.tokenizer()
    assert tokenizer.eos_token_id == prepared.eos_id and len(tokenizer) == prepared.vocab_size
    for split in ("train", "val"):
        facts = prepared.index.splits[split]
        texts = tokenizer.decode(stream(prepared, split).tolist()).split("<|endoftext|>")
        assert texts.pop() == "" and len(texts) == facts.documents
        assert sum(len(text.encode()) for text in texts) == facts.bytes
        assert prepared.bytes_per_token(split) == facts.bytes / facts.tokens == facts.bytes / prepared.tokens(split)


def test_numbers_out_of_range_are_refused(prepared: TokenData) -> None:
    tokens = prepared.tokens("val")
    good: dict[str, int] = {"batch_size": 4, "block": BLOCK, "seed": 0}
    with pytest.raises(DataError, match=f"a block of {tokens + 1} tokens is longer than the val split.* {tokens}."):
        prepared.batch("val", 0, **good | {"block": tokens + 1})
    with pytest.raises(DataError, match="longer than the val split"):
        prepared.val_batches(1, tokens + 1)
    for wrong in ({"block": 1}, {"batch_size": 0}, {"world": 3}, {"seed": -1}, {"rank": 1}, {"rank": -1}):
        with pytest.raises(DataError):
            prepared.batch("train", 0, **good | wrong)
    with pytest.raises(DataError, match="step -1"):
        prepared.batch("train", -1, **good)
    with pytest.raises(DataError, match="at least one window"):
        prepared.val_batches(4, BLOCK, limit=0)
    with pytest.raises(UnknownNameError, match="no split is called 'valid'; did you mean 'val'"):
        prepared.tokens("valid")


def test_a_model_with_too_small_a_vocabulary_is_refused(prepared: TokenData) -> None:
    check_vocabulary(prepared, prepared.vocab_size)
    check_vocabulary(prepared, 50_257)
    with pytest.raises(DataError, match="has 400 tokens, the model an embedding of 399. Give"):
        check_vocabulary(prepared, 399)


def flip_a_token(folder: Path) -> None:
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[123] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "val-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def edit_index(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("ba", "ab"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_token, "train-00001.bin: altered after it was prepared"),
        (truncate, r"val-00000.bin: \d+ bytes where index.json says \d+: truncated or altered. Restore it, or remove"),
        (lambda folder: (folder / "train-00000.bin").unlink(), "train-00000.bin: missing. Restore it"),
        (another_tokenizer, "tokenizer.json: altered; the tokens were made by another tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
        (edit_index(version=2), "format version 2, this lowbits reads up to 1. Upgrade lowbits"),
        (edit_index(version="x"), "index.json: damaged"),
        (edit_index(splits={"train": {}}), "index.json: damaged"),
        (edit_index(dtype="float16"), "index.json: damaged"),
        (edit_index(surprise=1), "index.json: damaged"),
        (lambda folder: (folder / "index.json").write_text("{"), "index.json: damaged"),
        (lambda folder: (folder / "index.json").unlink(), "no index.json, so no token data. Make some with"),
    ],
)
def test_damaged_data_is_refused_by_name(
    prepared: TokenData, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    assert TokenData.open(folder).fingerprint == prepared.fingerprint
    damage(folder)
    with pytest.raises(LowbitsError, match=message) as caught:
        TokenData.open(folder)
    assert isinstance(caught.value, DataError) and "\n" not in str(caught.value)
