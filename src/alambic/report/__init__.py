"""The report of a build: page, plots, model card."""
