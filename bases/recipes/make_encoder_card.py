"""Write the card of the French and English encoder from its record and its benchmark; no figure is typed by hand.

    python bases/recipes/make_encoder_card.py MODEL [--benchmark docs/benchmarks/encoder.md] [--watts W]

MODEL is what `alambic distil` wrote (distil.json, config.json); its README.md is replaced. Run it before `ship.py`.
`--watts` is the power of one busy core, which turns the time of the training into an estimate of energy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from encoder_text import ENGLISH, FRENCH

# Where the sentences come from and what they ask: file of the corpus -> (licence, source).
SOURCES = {
    "fr_news": ("CC BY-SA 4.0", "OrangeSum, training parts (Tixierae/OrangeSum)"),
    "fr_novels": ("public domain", "COST-ELTeC/ELTeC-fra"),
    "fr_sentences": ("CC0 1.0", "Mozilla Common Voice, sentences"),
    "fr_msdocs": ("CC BY 4.0", "MicrosoftDocs: sql-docs.fr-fr, visualstudio-docs.fr-fr, Dynamics-365-Operations.fr-fr"),
    "fr_docs": ("CC BY 3.0 and 4.0, Licence Ouverte, public domain",
                "PHP manual, React and Vue documentation, guides of Etalab, Code civil"),
    "fr_chat": ("Apache 2.0", "OpenAssistant, French (bofenghuang/vigogne)"),
    "en_wikipedia": ("CC BY-SA 3.0", "English Wikipedia, 2014"),
    "en_books": ("public domain", "mlschmitt/classic-books-markdown"),
    "en_docs": ("CC BY 3.0 and 4.0", "PHP manual"),
    "en_prompts": ("Apache 2.0", "P3 (yizhongw/self-instruct)"),
}  # fmt: skip
PAIRS = (("CC BY 2.0 FR", "Tatoeba"), ("CC BY 3.0", "PHP manual, English and French"), ("CC0 1.0", "python-docs-fr"))


def main() -> None:
    """Parse, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--licence", default="apache-2.0")
    parser.add_argument("--benchmark", type=Path, help="page of benchmarks/encoder.py")
    parser.add_argument("--watts", type=float, help="of one busy core")
    options = parser.parse_args()
    page = None if options.benchmark is None else options.benchmark.read_text("utf-8")
    text = card(options.model, licence=options.licence, benchmark=page, watts=options.watts)
    (options.model / "README.md").write_text(text, "utf-8", newline="\n")


def card(model: Path, *, licence: str, benchmark: str | None, watts: float | None) -> str:
    """Return the card as Markdown."""
    record, config = (json.loads((model / name).read_text("utf-8")) for name in ("distil.json", "config.json"))
    found, name = record["retrieval"], record["name"]
    lines = [
        "---", f"license: {licence}", "language:", "- fr", "- en", "library_name: sentence-transformers", "---", "",
        f"# {name}", "",
        f"French and English sentence encoder: {config['num_hidden_layers']} layers of {config['hidden_size']}, "
        f"{config['vocab_size']:,} pieces, cased, accents kept. Vectors of both languages lie in one space. It opens "
        "in transformers and sentence-transformers (mean of the states, length 1), and packs to OpenVINO and ONNX.",
        "",
        f"It follows {record['teacher']['name']} ({record['teacher']['licence']}; Reimers and Gurevych 2020), made by "
        f"`alambic distil` from {record['pairs']:,} pairs of sentences and {record['more']['known']:,} English ones; "
        f"{record['more']['new']:,} French sentences shaped its vocabulary and the start of its word table.",
        "",
        *_guesses(record["stages"].get("masked")),
        f"{record['held_out']:,} pairs held out, accuracy at one of {found['n']:,}: French to English "
        f"{found['from_new']:.1%}, English to French {found['from_known']:.1%}. They chose the weights.",
        "",
        "The weights shipped are these in 8 bits with one scale a row, unpacked to float32.",
        "",
        "## What it is for", "",
        "A start for classification of French, English or mixed texts, retrieval across the two, and labelling. Not "
        "for other languages. It reads 256 tokens by default. It was not tested for bias.",
        "",
        "## Data and licences", "",
        "| source | licence | sentences at most |", "|---|---|---|",
        *(f"| {source} | {terms} | pairs |" for terms, source in PAIRS),
        *(f"| {SOURCES[file][1]} | {SOURCES[file][0]} | {count:,} |" for file, count in {**FRENCH, **ENGLISH}.items()),
        "", "Keep these notices with the weights.", "",
        "## Compute and energy", "", _compute(record, watts), "",
        "## Measured", "",
        "Not measured." if benchmark is None else _tables(benchmark),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _guesses(masked: dict[str, Any] | None) -> list[str]:
    """Return a paragraph on the stage `masked`, where there was one."""
    if masked is None:
        return []
    new = masked["new"]
    before, after = new["before"], new["after"]
    text = (f"Before that it guessed masked words in {masked['tokens']:,} tokens of text (Devlin et al. 2019): "
            f"{before['value']:.2f} to {after['value']:.2f} nats a guessed token of {new['lines']:,} held-out French "
            f"lines (95 % interval {after['low']:.2f} to {after['high']:.2f}, {new['guessed']:,} tokens).")  # fmt: skip
    return [text, ""]


def _compute(record: dict[str, Any], watts: float | None) -> str:
    hours = sum(stage["seconds"] for stage in record["stages"].values()) / 3600
    tokens = sum(stage["tokens"] for stage in record["stages"].values())
    energy = (
        "Energy: unavailable (no counter was read)."
        if watts is None
        else f"Energy: estimated, {hours * watts / 1000:.3f} kWh at {watts:g} W a core; memory and cooling left out."
    )
    stages = ", ".join(record["stages"])
    return f"{hours:.1f} h of one thread for {tokens:,} tokens of the stages {stages}. {energy}"


def _tables(page: str) -> str:
    """Return the page without its title, its sections one level deeper."""
    lines = [line for line in page.split("\n") if not line.startswith("# ")]
    return "\n".join(f"#{line}" if line.startswith("## ") else line for line in lines).strip()


if __name__ == "__main__":
    main()
