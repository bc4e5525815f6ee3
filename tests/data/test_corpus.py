# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbits.data._corpus import Corpus, partition
from lowbits.errors import DataError
from tests.data.made_up import Memory, made_up


def sides(texts: list[str], val_fraction: float = 0.2) -> tuple[Corpus, list[str], list[str]]:
    corpus = Corpus(Path("."))
    corpus.add(Memory(texts), lambda size: None)
    parts = partition(corpus, val_fraction)
    train, val = (list(parts.texts(corpus, split)) for split in ("train", "val"))
    corpus.close()
    return corpus, train, val


def squeeze(text: str) -> str:
    return " ".join(text.split())


words = st.text(alphabet="ab \n\té", max_size=12)


@given(st.lists(words, min_size=3, max_size=60).filter(lambda texts: len({squeeze(t) for t in texts} - {""}) > 2))
def test_every_distinct_document_stands_on_one_side_and_only_once(texts: list[str]) -> None:
    corpus, train, val = sides(texts)
    distinct = {squeeze(text) for text in texts} - {""}
    assert corpus.duplicates + corpus.empty == len(texts) - len(distinct)
    if len(train) + len(val) == len(distinct):  # no document had to be cut
        assert {squeeze(text) for text in train} | {squeeze(text) for text in val} == distinct
    else:
        assert len(val) == 1 and len(train) == len(distinct) and any(text.endswith(val[0]) for text in texts)


def test_the_side_of_a_document_does_not_depend_on_the_others() -> None:
    few, many = made_up(400), made_up(800)[::-1]
    _, _, val_few = sides(few)
    _, _, val_many = sides(many + few)
    assert 40 < len(val_few) < 120 and set(val_few) < set(val_many)
    assert len(val_few) == len(set(val_many) & set(few))


def test_a_copy_with_other_white_space_is_dropped() -> None:
    texts = made_up(50)
    corpus, train, val = sides([*texts, *("  " + text.replace(" ", "\n\t ") for text in texts), " \n"])
    assert (corpus.duplicates, corpus.empty, len(corpus)) == (50, 1, 50)
    assert sorted(train + val) == sorted(texts)


def test_one_long_document_is_cut_once_at_a_paragraph() -> None:
    book = "\n\n".join(made_up(200))
    _, train, val = sides([book], 0.1)
    assert train[0] + val[0] == book and len(train) == len(val) == 1
    assert train[0].endswith("\n\n") and 0.1 <= len(val[0]) / len(book) < 0.12


def test_a_document_longer_than_the_validation_share_is_never_held_out_whole() -> None:
    for seed in range(30):  # among so many, some hash below 0.2
        book, *chapters = made_up(4, seed=seed)
        book *= 50
        _, train, val = sides([book, *chapters])
        assert sum(map(len, val)) < 0.25 * sum(map(len, train + val)) and val


def test_text_without_paragraphs_is_cut_between_characters() -> None:
    _, train, val = sides(["é" * 100], 0.25)
    assert (train, val) == (["é" * 75], ["é" * 25])


def test_an_empty_source_and_half_a_character_are_named(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    with pytest.raises(DataError, match="memory: empty, there is no text in it"):
        corpus.add(Memory(["", " \n"]), lambda size: None)
    with pytest.raises(DataError, match="memory: document 2 holds half of a surrogate pair"):
        corpus.add(Memory(["ok", "\ud800"]), lambda size: None)
    corpus.close()
