"""Training: what is learnt, how a step computes, and how it goes on after a kill."""

import os

# oneDNN keeps what it compiled for each shape, 1,024 of them unless told otherwise, and hardly two steps have the same
# shape: hundreds of megabytes an hour for nothing (docs/lab-notes.md, 2026-11-21). It asks once, at its first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
