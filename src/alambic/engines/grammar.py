"""JSON Schema to a grammar that a model cannot leave, nor stay in for ever.

    grammar = compile_schema(schema)
    ebnf(grammar.root)      # compact JSON: no free white space
    grammar.most_tokens     # a limit of tokens that surely suffices

Texts of the grammar are a part of the schema's: keys stand in the order of `properties`, nothing undeclared is written,
and what the schema leaves open gets a bound (`Limits`). A weak model otherwise writes white space or digits for ever.
Keywords that would be ignored are refused by name; annotations (title, format of unknown kind ...) are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alambic.engines.grammar_schema import Compiler, Limits
from alambic.engines.grammar_tree import Node, closing_bytes, longest, tightened
from alambic.errors import EngineError

__all__ = ["Grammar", "Limits", "closing", "compile_schema"]

# How much of what is left to write is given up when the limit of tokens comes near: characters, shortest options only.
_CLOSING = ((128, False), (32, False), (32, True), (8, True), (3, True), (0, True))
_SPARE = 64  # tokens kept beyond the least that closing needs, so that the last values are not stubs


@dataclass(frozen=True)
class Grammar:
    """What an answer may be."""

    root: Node

    @cached_property
    def most_tokens(self) -> int:
        """Tokens that any answer fits in, its end token included: each stands for a byte or more."""
        return longest(self.root) + 1

    @cached_property
    def least_tokens(self) -> int:
        """The smallest limit of tokens with which an answer is surely complete."""
        return closing_bytes(self.root) + 1

    def first_limit(self, tokens: int) -> int:
        """Tokens to write freely when `tokens` is all there is; after them the answer goes on with `closing`.

        Raises:
            EngineError: `tokens` cannot be enough.
        """
        if self.most_tokens <= tokens:
            return tokens
        if self.least_tokens > tokens:
            raise EngineError(
                f"json_schema: an answer may need {self.least_tokens} tokens to be complete, max_tokens is {tokens}",
                hint="raise max_tokens, or shorten the schema",
            )
        return tokens - min(self.least_tokens + _SPARE, max(self.least_tokens, tokens // 2))


def closing(left: Node, tokens: int) -> Node:
    """Return `left` so shortened that it surely ends within `tokens`, no more than needed."""
    for free, prune in _CLOSING:
        short = tightened(left, free=free, prune=prune)
        if longest(short) < tokens:
            break
    return short


def compile_schema(schema: Mapping[str, Any] | bool, *, limits: Limits | None = None) -> Grammar:
    """Compile a JSON Schema (draft 2020-12).

    Raises:
        EngineError: it cannot be satisfied, or uses a keyword that is not understood; keyword and path are named.
    """
    compiler = Compiler(schema, limits or Limits())
    root = compiler.node(schema, "#", ())
    if root is None:
        raise EngineError(f"json_schema: cannot be satisfied: {compiler.why or 'it allows no value'}")
    return Grammar(root)
