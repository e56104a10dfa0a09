"""The benchmark of our decoder and its model card: the figures they print are those that they were given."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bases" / "recipes"), str(ROOT / "benchmarks")]

import make_card  # noqa: E402
import own_base  # noqa: E402


def test_paired_difference_covers_no_difference_only_when_there_is_none():
    value, low, high = own_base.paired([1.0] * 60 + [0.0] * 40, [0.0] * 100)
    assert value == pytest.approx(0.6) and 0.5 < low < 0.6 < high < 0.7
    value, low, high = own_base.paired([0.0, 1.0] * 50, [1.0, 0.0] * 50)
    assert low < 0 < high and value == 0


def test_bandwidth_is_that_of_bytes_read_once():
    assert 0.05 < own_base.bandwidth(1 << 22, repeats=3) < 2000


def test_page_shows_scores_difference_and_what_was_not_run():
    speed = {
        "weight_bytes": 10_000_000,
        "n": 60,
        "tokens": 100.0,
        "tokens_per_second": {"value": 500.0, "low": 490.0, "high": 510.0},
        "cached_gb_s": [20.0, 10.0],
        "memory_gb_s": [9.0, 10.0],
    }
    page = own_base._page({"piaf-ours": _result(0.5), "piaf-random": _result(0.25)}, speed)
    assert "| 50.0 [40.0, 60.0] | 25.0 [15.0, 35.0] | +25.0 [+25.0, +25.0] |" in page
    assert "| orangesum | | not run |" in page
    assert "25% reached" in page and "50% reached" in page  # of 2,000 and of 1,000 tokens/s
    assert "3 rows too long and left out" in page and "2 prompts too long to answer" in page


def test_field_service_rows_are_split_without_its_test():
    parts = own_base.chats("field-service")
    asked = {name: {chat.messages[0].content for chat in rows} for name, rows in parts.items()}
    assert len(parts["dev"]) == 100 and len(parts["test"]) == 258
    assert not asked["train"] & asked["dev"] and not asked["dev"] & asked["test"]


def test_card_says_what_was_measured_and_what_was_not(tmp_path):
    options = _measured(tmp_path)
    samples = [{"asked": "Titre :\n\nUn texte", "told": "Un\ntitre", "reason": "length", "tokens": 64}]
    text = make_card.card(options, samples)
    assert "license: cc-by-sa-4.0" in text and "Share-alike sources: fr_news." in text
    assert "| fr_docs | 1.200 | 1.500 |" in text and "| fr_news | 1.400 | 1.300 |" in text
    assert "Below the 5-gram on 1 of 2 sources; not on fr_news." in text
    assert "Energy: unavailable" in text and "Not measured." in text
    assert "**Titre : ⏎  ⏎ Un texte**" in text and "> Un ⏎ titre *(cut at 64 tokens)*" in text
    options.watts, options.kneser_ney = 10.0, None
    text = make_card.card(options, [])
    assert "estimated, 0.02 kWh = 2.0 h" in text and "The 5-gram was not measured." in text


def test_card_of_a_model_without_training_record_is_refused(tmp_path):
    options = _measured(tmp_path)
    (options.model / "training.json").unlink()
    with pytest.raises(SystemExit, match=r"training\.json: not there"):
        make_card.card(options, [])


def _result(value):
    score = {"value": value, "low": value - 0.1, "high": value + 0.1, "range": [0.0, 1.0]}
    return {
        "n": 20,
        "rows": 100,
        "left_out": 3,
        "errors": 2,
        "scores": {"token_f1": score, "squad_em": score},
        "each": [value] * 20,
        "tokens": 1000,
        "seconds": 60.0,
        "rate": 0.001,
        "signatures": {"token_f1": "F1"},
    }


def _measured(folder):
    part = {"documents": 10, "tokens": 1000, "utf8_bytes": 4000}
    sources = [
        {"name": name, "language": "fr", "licence": licence, "weight": 0.5, "train": part, "valid": part}
        for name, licence in (("fr_docs", "CC-BY-4.0"), ("fr_news", "CC-BY-SA-4.0"))
    ]
    training = {
        "parameters": 8_000_000,
        "tokens": 5000,
        "sources": {"fr_docs": 1.2, "fr_news": 1.4},
        "bits_per_byte": 1.3,
        "machine": {"cpu": "a processor", "cores": 2},
        "seconds": 7200.0,
        "cpu_seconds": 7200.0,
        "threads": 1,
        "processes": 1,
        "device": "cpu",
        "precision": "float32",
        "tokens_per_second": 3000.0,
        "utilisation": None,
        "step": 10,
        "steps": 10,
    }
    files = {
        "training.json": training,
        "config.json": {"max_position_embeddings": 512, "vocab_size": 8000},
        "shards.json": {"sources": sources},
        "kn.json": {"fr_docs": 1.5, "fr_news": 1.3, "all": 1.4},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return argparse.Namespace(
        model=folder,
        name="alambic-fr-en",
        description="A decoder.",
        pretrained=None,
        shards=folder,
        kneser_ney=folder / "kn.json",
        instructions=None,
        benchmark=None,
        watts=None,
    )
