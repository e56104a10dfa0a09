"""Fill the model card of a base from what was measured; nothing in it is typed by hand.

    python bases/recipes/make_card.py MODEL --pretrained FOLDER --shards FOLDER --kneser-ney KN.json \
        --instructions runs/instructions --benchmark docs/benchmarks/own_base.md --out MODEL/README.md

MODEL is the Model directory that ships; `--pretrained` (MODEL by default) has training.json of its pre-training.
Samples are written by MODEL in its int8 form, through the engine. What is not given is said to be not measured.
`--watts` is the power of one busy core, which turns CPU time into an estimate of energy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_PASSAGE_FR = (
    "La médiathèque rouvre le 3 mars après six mois de travaux. L'entrée est gratuite. Les ateliers, animés par "
    "Nadège Besson, ont lieu le mercredi à 14 h."
)
_PASSAGE_EN = (
    "The library opens again on 3 March after six months of works. Entry is free. Workshops, led by Nadia Benson, "
    "take place on Wednesdays at 2 pm."
)
PROMPTS = (
    f"Réponds à la question d'après le texte.\n\n{_PASSAGE_FR}\n\nQuestion : Qui anime les ateliers ?",
    f"{_PASSAGE_FR}\n\nQuestion : Combien coûte un abonnement ?",
    f"Résume ce texte en une phrase.\n\n{_PASSAGE_FR}",
    "Remets les accents : L'ete dernier, la riviere etait a sec.",
    "Classe ce message dans une de ces catégories : panne, facture, livraison\n\nMon colis n'est jamais arrivé.",
    f'{_PASSAGE_FR}\n\nRemplis ce JSON d\'après le texte : {{"date": "string", "entree": "string"}}',
    "Qui a écrit Les Misérables ?",
    f"Answer the question from the text.\n\n{_PASSAGE_EN}\n\nQuestion: When does the library open again?",
    f"{_PASSAGE_EN}\n\nQuestion: How many books does it hold?",
    f"Summarise this text in one sentence.\n\n{_PASSAGE_EN}",
    "Make this message formal: Can't make it Monday, can we move it?",
    "Which label fits? refund, delivery, account\n\nMessage: I cannot log in any more.",
    "What is the capital of Australia?",
)
_SAMPLE_TOKENS = 64
_SHARE_ALIKE = ("BY-SA", "Sharing")


def main() -> None:
    """Parse, gather, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", default="alambic-fr-en")
    parser.add_argument(
        "--description", default="A small French and English decoder, made from nothing on one machine."
    )
    parser.add_argument("--pretrained", type=Path, help="folder with training.json; the model's own when absent")
    parser.add_argument("--shards", type=Path, required=True, help="shards that it was pre-trained on")
    parser.add_argument("--kneser-ney", type=Path, help="output of benchmarks/kneser_ney.py")
    parser.add_argument("--instructions", type=Path, help="folder of make_instructions.py")
    parser.add_argument("--benchmark", type=Path, help="page of benchmarks/own_base.py")
    parser.add_argument("--watts", type=float, help="of one busy core, for the estimate of energy")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = card(options, write_samples(options.model))
    options.out.write_text(text, encoding="utf-8")


def card(options: argparse.Namespace, samples: list[dict[str, Any]]) -> str:
    """Return the card as Markdown."""
    import jinja2

    training = _json((options.pretrained or options.model) / "training.json")
    shards = _json(options.shards / "shards.json")
    instructions = _json(options.instructions / "datasheet.json") if options.instructions else None
    reference = _json(options.kneser_ney) if options.kneser_ney else {}
    model = _json(options.model / "config.json")
    bits = [
        {"name": name, "model": value, "reference": reference.get(name)}
        for name, value in [*training["sources"].items(), ("all", training["bits_per_byte"])]
        if value is not None
    ]
    sources = shards["sources"]
    tokens = sum(source["train"]["tokens"] for source in sources)
    values = {
        "name": options.name,
        "description": options.description,
        "training": training,
        "context": model["max_position_embeddings"],
        "vocabulary": model["vocab_size"],
        "sources": sources,
        "instructions": instructions,
        "bits": bits,
        "families": _families(instructions),
        "samples": samples,
        "licence": _licence(sources, instructions),
        "data_line": f"Pre-trained on {training['tokens']:,} tokens drawn from {tokens:,}, shared by source.",
        "compute": _compute(training),
        "energy": _energy(training, options.watts),
        "verdict": _verdict(bits),
        "benchmark": _benchmark(options.benchmark),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((HERE / "card.md.jinja").read_text("utf-8")).render(values)


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise SystemExit(f"{path}: not there") from error
    return found


def _families(instructions: dict[str, Any] | None) -> list[str]:
    if instructions is None:
        return ["answers from a passage", "short texts"]
    return sorted({name.rsplit(" (", 1)[0] for name in instructions["by_family"]})


def _licence(sources: list[dict[str, Any]], instructions: dict[str, Any] | None) -> dict[str, str]:
    """Say which licences the sources ask for; weights are offered under share-alike terms where a source has them."""
    named = {source["name"]: source["licence"] for source in sources}
    if instructions:
        named |= {name.rsplit(" (", 1)[0]: name.rsplit(" (", 1)[1][:-1] for name in instructions["by_source"]}
    shared = sorted(name for name, licence in named.items() if any(mark in licence for mark in _SHARE_ALIKE))
    if not shared:
        return {"tag": "apache-2.0", "text": "No source is share-alike."}
    return {
        "tag": "cc-by-sa-4.0",
        "text": f"Share-alike sources: {', '.join(shared)}. Keep their notices with the weights.",
    }


def _compute(training: dict[str, Any]) -> str:
    machine = training["machine"]
    used = training.get("utilisation")
    share = f", {100 * used:.0f}% of the peak ({training['peak_source']})" if used else ""
    return (
        f"{training['seconds'] / 3600:.1f} h on {training['threads']} thread(s), {training['processes']} process(es), "
        f"{training['device']} ({machine['cpu']}, {machine['cores']} cores), {training['precision']}: "
        f"{training['tokens_per_second']:,.0f} tokens/s{share}; {training['step']:,} of {training['steps']:,} steps. "
        "Pre-training alone; instruction tuning and preferences come on top."
    )


def _energy(training: dict[str, Any], watts: float | None) -> str:
    hours = training["cpu_seconds"] / 3600
    if watts is None:
        return f"Energy: unavailable (no counter was read; {hours:.1f} h of CPU time)."
    return (
        f"Energy: estimated, {hours * watts / 1000:.2f} kWh = {hours:.1f} h of CPU time at {watts:g} W a core; "
        "memory, disk and cooling are not in it."
    )


def _verdict(bits: list[dict[str, Any]]) -> str:
    known = [row for row in bits if row["reference"] is not None and row["name"] != "all"]
    if not known:
        return "The 5-gram was not measured."
    worse = [row["name"] for row in known if row["model"] >= row["reference"]]
    return f"Below the 5-gram on {len(known) - len(worse)} of {len(known)} sources" + (
        f"; not on {', '.join(worse)}." if worse else "."
    )


def _benchmark(path: Path | None) -> str:
    if path is None:
        return "Not measured."
    if not path.is_file():
        raise SystemExit(f"{path}: not there")
    lines = path.read_text("utf-8").split("\n")
    return "\n".join(line for line in lines if not line.startswith("# ")).strip()


def write_samples(model: Path) -> list[dict[str, Any]]:
    """Let the int8 form of `model` answer every prompt of the list."""
    from alambic.engines.bundle_writer import load_writer
    from alambic.events import drain
    from alambic.kinds.chat import Chat
    from alambic.kinds.generation import GenerationRequest, Sampling
    from alambic.pack.writer_openvino import pack_openvino

    with tempfile.TemporaryDirectory() as folder:
        part = drain(pack_openvino(model, Path(folder) / "part", precision="int8"))
        writer = load_writer(part, Path(folder) / "part", threads=1)
        try:
            sampling = Sampling(max_tokens=_SAMPLE_TOKENS)
            replies = writer.write([GenerationRequest(chat=Chat.of(text), sampling=sampling) for text in PROMPTS])
        finally:
            writer.close()
    return [
        {"asked": text, "told": reply.text, "reason": reply.finish_reason, "tokens": _SAMPLE_TOKENS}
        for text, reply in zip(PROMPTS, replies, strict=True)
    ]


if __name__ == "__main__":
    main()
