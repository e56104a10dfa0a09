"""Defaults of fine-tuning by table: rate, passes and rows a step. Starting points, all overridable in a recipe."""

from __future__ import annotations

# Peak rate by parameters, (most, rate). New models learn everything; trained ones must not forget. Adapters take about
# ten times the rate of full training, nearly whatever their rank and the model's size
# (Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/).
_NEW = ((10_000_000, 1.5e-3), (50_000_000, 1e-3), (200_000_000, 6e-4), (float("inf"), 3e-4))
# The first of `_FULL` and `_NEW`: lab notes, 2026-11-22 and 2026-11-21.
_FULL = ((50_000_000, 5e-4), (200_000_000, 1e-4), (700_000_000, 3e-5), (2_000_000_000, 2e-5), (float("inf"), 1e-5))
_ADAPTER = ((200_000_000, 5e-4), (2_000_000_000, 2e-4), (float("inf"), 1e-4))

_PREFERENCE = 20
_NEW_TOKENS = 2048  # a step: half of 4,096 learns a pass faster (lab notes, 2026-11-21)
_ROWS = (8, 16, 256)  # a step: fewest, those of a trained model, most


def default_rate(parameters: int, *, method: str, new: bool) -> float:
    """Return the peak rate of a model with so many `parameters`; `new`: made from nothing."""
    table = _ADAPTER if method != "full" else _NEW if new else _FULL
    return next(rate for most, rate in table if parameters <= most)


def default_epochs(rows: int, *, new: bool) -> float:
    """Return the passes over `rows` rows at most; dev stops earlier."""
    if new:
        return 60.0 if rows < 5_000 else 30.0 if rows < 100_000 else 5.0
    return 5.0 if rows < 1_000 else 3.0 if rows < 20_000 else 1.0


def default_rows_a_step(rows: int, mean_tokens: float, *, new: bool) -> int:
    """Return the rows of a step: about 2,048 tokens for a new model, 16 rows for a trained one, fewer of few rows."""
    fewest, usual, most = _ROWS
    wanted = min(most, max(usual, round(_NEW_TOKENS / mean_tokens))) if new else usual
    return max(1, min(wanted, max(fewest, rows // 20)))


def default_preference_rate(parameters: int, *, method: str, new: bool) -> float:
    """Return the peak rate of preference training: far lower, since the loss only ever asks for more of the same.

    A twentieth of the fine-tuning's is 1e-6 for a large model whole (Rafailov et al. 2023, appendix B) and ten times
    that for its adapters; a small model needs more to move at all, as in its fine-tuning.
    """
    return default_rate(parameters, method=method, new=new) / _PREFERENCE
