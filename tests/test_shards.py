"""Shards: written as a stream, opened by mapping, checked whole."""

import json

import numpy as np
import pytest

from alambic.data.shards import (
    PartCounts,
    Shards,
    ShardSource,
    describe,
    dtype_for,
    open_shards,
    write_index,
    write_part,
)
from alambic.errors import DataError

DOCUMENTS = {"train": [([5, 6, 7], 9), ([8], 3)], "valid": [([6, 6], 4)]}


@pytest.fixture
def folder(tmp_path):
    counts = {
        part: write_part(tmp_path, part, "fr", iter(documents), dtype="uint16", end_id=2)
        for part, documents in DOCUMENTS.items()
    }
    source = ShardSource("fr", "fr", "CC0-1.0", 1.0, counts["train"], counts["valid"])
    write_index(Shards(tmp_path, 300, "uint16", "ab" * 32, 2, (source,)))
    return tmp_path


def test_tokens_come_back_with_ends_when_opened(folder):
    shards = open_shards(folder)
    assert shards.tokens("train", "fr").tolist() == [5, 6, 7, 2, 8, 2]
    assert shards.offsets("train", "fr").tolist() == [0, 4, 6]
    assert shards.tokens("valid", "fr").tolist() == [6, 6, 2]
    assert (shards.vocabulary, shards.end_id, shards.tokenizer_digest) == (300, 2, "ab" * 32)
    assert shards.source("fr").train == PartCounts(documents=2, tokens=6, utf8_bytes=12)
    assert shards.total("valid") == PartCounts(documents=1, tokens=3, utf8_bytes=4)


def test_files_are_little_endian_when_read_without_us(folder):
    assert (folder / "train" / "fr.bin").read_bytes()[:4] == b"\x05\x00\x06\x00"
    assert np.load(folder / "train" / "fr.idx.npy").dtype == np.int64


def test_ids_take_four_bytes_when_the_vocabulary_is_large(tmp_path):
    assert (dtype_for(65_536), dtype_for(65_537)) == ("uint16", "uint32")
    counts = write_part(tmp_path, "train", "x", [([70_000], 1)], dtype="uint32", end_id=1)
    empty = write_part(tmp_path, "valid", "x", [], dtype="uint32", end_id=1)
    write_index(Shards(tmp_path, 80_000, "uint32", "", 1, (ShardSource("x", "en", "MIT", 1.0, counts, empty),)))
    shards = open_shards(tmp_path)
    assert shards.tokens("train", "x").tolist() == [70_000, 1]
    assert shards.tokens("valid", "x").tolist() == [] and shards.offsets("valid", "x").tolist() == [0]


def test_id_that_does_not_fit_is_refused_when_written(tmp_path):
    with pytest.raises(OverflowError):
        write_part(tmp_path, "train", "x", [([70_000], 1)], dtype="uint16", end_id=1)


def test_cut_file_is_refused_when_opened(folder):
    path = folder / "train" / "fr.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"fr\.bin: has 10 bytes; shards\.json says 12"):
        open_shards(folder)


def test_offsets_of_other_shards_are_refused_when_opened(folder):
    np.save(folder / "valid" / "fr.idx.npy", np.array([0, 2], np.int64))
    with pytest.raises(DataError, match="does not agree"):
        open_shards(folder)


def test_folder_without_index_says_how_to_make_one_when_opened(tmp_path):
    with pytest.raises(DataError, match=r"no shards\.json") as caught:
        open_shards(tmp_path)
    assert "--only shards" in str(caught.value)


def test_newer_format_is_refused_when_opened(folder):
    record = json.loads((folder / "shards.json").read_text())
    (folder / "shards.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_shards(folder)


def test_shares_that_are_no_whole_are_refused_when_written(tmp_path):
    part = PartCounts(0, 0, 0)
    with pytest.raises(DataError, match=r"add up to 0\.5"):
        write_index(Shards(tmp_path, 9, "uint16", "", 1, (ShardSource("x", "en", "MIT", 0.5, part, part),)))


def test_unknown_source_names_the_known_ones_when_asked(folder):
    with pytest.raises(DataError, match="known: fr"):
        open_shards(folder).tokens("train", "en")


def test_bytes_per_token_are_by_language_when_described(folder):
    found = describe(open_shards(folder))
    assert found["languages"]["fr"] == {"tokens": 6, "weight": 1.0, "bytes_per_token": 2.0}
    assert found["train"]["documents"] == 2


def test_part_written_whole_is_kept_when_gone_on_with(tmp_path):
    first = write_part(tmp_path, "train", "x", [([5], 1)], dtype="uint16", end_id=1)
    with pytest.raises(RuntimeError, match="power cut"):
        write_part(tmp_path, "valid", "x", _failing(), dtype="uint16", end_id=1)
    assert write_part(tmp_path, "train", "x", _failing(), dtype="uint16", end_id=1) == first
    valid = write_part(tmp_path, "valid", "x", [([6], 1)], dtype="uint16", end_id=1)
    write_index(Shards(tmp_path, 9, "uint16", "", 1, (ShardSource("x", "en", "MIT", 1.0, first, valid),)))
    shards = open_shards(tmp_path)
    assert shards.tokens("train", "x").tolist() == [5, 1] and shards.tokens("valid", "x").tolist() == [6, 1]
    assert not list(tmp_path.rglob("*.done"))


def _failing():
    yield [7], 1
    raise RuntimeError("power cut")
