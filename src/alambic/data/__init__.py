"""Data: read, check, clean, split."""
