"""Instruction rows for a small French and English decoder; see ../make_instructions.py."""
