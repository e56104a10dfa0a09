"""Kinds of task: what an input and a prediction are, metric names, default candidates."""
