"""Packing: a Model into an engine's format, with the proof that both agree."""
