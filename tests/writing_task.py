"""A task that a tiny model learns in seconds: turn two words round. Used by the tests of training."""

from alambic.kinds.chat import Chat

WORDS = ["alpha", "beta", "gamma", "delta", "omega", "sigma", "kappa", "theta"]


def swaps(words=WORDS):
    """Return a conversation for each pair of different words."""
    return [Chat.of(f"{a} {b}", completion=f"{b} {a}") for a in words for b in words if a != b]
