"""The kinds that write: `generate` (text to text), `chat` (several turns, tools), `extract` (text to JSON)."""

from __future__ import annotations

WRITING = ("generate", "chat", "extract")
KINDS = ("classify", *WRITING)

# The first decides unless the budget names another. All are shares, 0..1, higher is better.
METRICS: dict[str, tuple[str, ...]] = {
    "generate": ("chrf", "bleu", "rouge_l", "token_f1", "exact_match"),
    "chat": ("token_f1", "chrf", "exact_match", "tool_calls"),
    "extract": ("field_f1", "json_valid", "exact_match"),
}

# The honest ladder, cheapest first: the answer of the nearest known input, the base as it is, the base fine-tuned.
DEFAULT_CANDIDATES: dict[str, tuple[str, ...]] = {
    "generate": ("nearest", "base", "finetune-int4", "finetune-int8", "finetune"),
    "chat": ("nearest", "base", "finetune-int4", "finetune-int8", "finetune"),
    "extract": ("tagger", "nearest", "base", "finetune-int4", "finetune-int8", "finetune"),
}

# Steps after the fine-tuned ones where the task has preferences, and the kinds that learn from them.
PREFERRED = ("preferred-int4", "preferred-int8", "preferred")
PREFERRING = ("generate", "chat")

TITLES = {
    "chrf": "chrF", "bleu": "BLEU", "rouge_l": "ROUGE-L", "token_f1": "token F1", "exact_match": "exact match",
    "tool_calls": "right tool calls", "field_f1": "field F1", "json_valid": "valid JSON",
}  # fmt: skip
