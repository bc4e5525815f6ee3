# SPDX-License-Identifier: Apache-2.0
"""Turn text into token shards, and token shards into batches that are a pure function of the step.

data = prepare("stdlib", "runs/data/stdlib", vocab_size=2048)      # once; the second time it is there already
batch = data.batch("train", step, batch_size=16, block=256, seed=0)
loss = model(input_ids=batch, labels=batch).loss                   # transformers shift the labels inside
"""

from __future__ import annotations

from lowbits.data._index import Index, Shard, Split
from lowbits.data._prepare import prepare
from lowbits.data._readers import HubDataset, JsonLines, Parquet, SavedDataset, TextFile
from lowbits.data._sources import Folder, Source, StandardLibrary, find_source
from lowbits.data._tokens import TokenData, check_vocabulary

__all__ = [
    "Folder",
    "HubDataset",
    "Index",
    "JsonLines",
    "Parquet",
    "SavedDataset",
    "Shard",
    "Source",
    "Split",
    "StandardLibrary",
    "TextFile",
    "TokenData",
    "check_vocabulary",
    "find_source",
    "prepare",
]
