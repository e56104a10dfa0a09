"""Data only: one folder a base. alambic reads the files where they lie and never imports this package."""
