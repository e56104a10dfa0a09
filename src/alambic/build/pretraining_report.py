"""The report of a corpus: what was read, kept and dropped, why, with examples. JSON for programs, a page for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alambic.data.corpus_contamination import TestIndex
from alambic.pretrain_config import PretrainConfig
from alambic.workspace import write_text


def corpus_record(
    config: PretrainConfig, counts: list[dict[str, Any]], decided: dict[str, Any], index: tuple[TestIndex, str] | None
) -> dict[str, Any]:
    """Join the counts of the sources with what was decided over all of them."""
    sources = {
        source.name: {"language": source.language, "licence": source.licence, **found, **decided[source.name]}
        for source, found in zip(config.source, counts, strict=True)
    }
    record: dict[str, Any] = {"name": config.name, "seed": config.seed, "sources": sources}
    if index is not None:
        tests, _ = index
        record["test_sets"] = {"files": len(tests.names), "texts": tests.texts, "not_searched": tests.not_searched,
                               "ngram": config.contamination.ngram, "short": config.contamination.short}  # fmt: skip
    return record


def write_report(record: dict[str, Any], folder: Path) -> Path:
    """Write corpus.json and corpus.md into `folder`; return the second."""
    write_text(folder / "corpus.json", json.dumps(record, ensure_ascii=False, indent=1))
    path = folder / "corpus.md"
    write_text(path, report_text(record))
    return path


def report_text(record: dict[str, Any]) -> str:
    """Return the page, in Markdown."""
    lines = [f"# Corpus of {record['name']}", "", *_summary(record), ""]
    if "shards" in record:
        lines += [*_tokens(record["shards"]), ""]
    lines += _tests(record)
    lines += ["## What was dropped, and why", ""]
    for name, source in record["sources"].items():
        lines += [*_dropped(name, source), ""]
    return "\n".join(lines)


def training_lines(training: dict[str, Any]) -> list[str]:
    """Return what a training came to, as lines for the terminal."""
    lines = [f"  trained    {training['tokens']:,} tokens, {training['tokens_per_second']:,.0f} a second"]
    if training["bits_per_byte"] is not None:
        by_source = ", ".join(f"{name} {value:.3f}" for name, value in training["sources"].items())
        lines.append(f"  held out   {training['bits_per_byte']:.3f} bits per byte ({by_source})")
    if not training["finished"]:
        step, steps = training["step"], training["steps"]
        lines.append(f"  stopped    at step {step:,} of {steps:,}: run the same command to go on")
    return lines


def _summary(record: dict[str, Any]) -> list[str]:
    lines = [
        "Documents count the pieces of long documents one by one. MB are 10^6 bytes of UTF-8 text.",
        "",
        "| source | language | licence | there MB | read MB | rules | tests | exact | near | held MB | train MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in record["sources"].items():
        rules = sum(d["documents"] for reason, d in s["dropped"].items() if reason != "test_text")
        tests = s["dropped"].get("test_text", {"documents": 0})["documents"]
        amounts = [_mb(s["utf8_bytes"]), _mb(s["read_bytes"]), f"{rules:,}", f"{tests:,}",
                   *(f"{s[key]['documents']:,}" for key in ("exact", "near")),
                   *(_mb(s[part]["utf8_bytes"]) for part in ("valid", "train"))]  # fmt: skip
        lines.append(f"| {name} | {s['language']} | {s['licence']} | {' | '.join(amounts)} |")
    return lines


def _tokens(shards: dict[str, Any]) -> list[str]:
    lines = [
        "## Tokens",
        "",
        f"Vocabulary of {shards['vocabulary']:,}. Tokens count the end of each document.",
        "",
        "| source | language | train tokens | held-out tokens | share of the mix | bytes per token |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in shards["sources"].items():
        lines.append(
            f"| {name} | {s['language']} | {s['train']['tokens']:,} | {s['valid']['tokens']:,} | {s['weight']:.1%} "
            f"| {s['bytes_per_token']:.2f} |"
        )
    for language, s in shards["languages"].items():
        lines.append(f"| **all** | {language} | {s['tokens']:,} | | {s['weight']:.1%} | {s['bytes_per_token']:.2f} |")
    return lines


def _tests(record: dict[str, Any]) -> list[str]:
    found = record.get("test_sets")
    if found is None:
        return ["## Test texts", "", "No test sets were named: nothing was looked for.", ""]
    by_set: dict[str, int] = {}
    for source in record["sources"].values():
        for name, count in source["test_sets"].items():
            by_set[name] = by_set.get(name, 0) + count
    short, ngram = found["short"], found["ngram"]
    lines = [
        "## Test texts",
        "",
        f"{found['texts']:,} texts of {found['files']:,} files were looked for by {ngram} words in a row, those of "
        f"{short} to {ngram - 1} words as a whole; {found['not_searched']:,} shorter ones and rows of numbers were "
        "not. A document that holds one is dropped whole.",
        "",
    ]
    if by_set:
        lines += ["| test set | documents dropped |", "|---|---|"]
        lines += [f"| {name} | {count:,} |" for name, count in sorted(by_set.items(), key=lambda item: -item[1])]
    else:
        lines.append("None was found.")
    return [*lines, ""]


def _dropped(name: str, source: dict[str, Any]) -> list[str]:
    lines = [f"### {name}", ""]
    reasons = dict(source["dropped"])
    for key, reason in (("exact", "exact_duplicate"), ("near", "near_duplicate")):
        if source[key]["documents"]:
            reasons[reason] = source[key]
    if not reasons:
        return [*lines, "Nothing."]
    for reason, found in sorted(reasons.items(), key=lambda item: -item[1]["documents"]):
        lines.append(f"- `{reason}`: {found['documents']:,} documents, {_mb(found['utf8_bytes'])} MB")
        for example in found["examples"]:
            where, text = ("", example) if isinstance(example, str) else (f"{example['where']}: ", example["text"])
            lines.append(f"  - {where}`{text.replace('`', chr(39))}`")
    return lines


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"
