"""The pages (to classify, chat, label) and the report. The Content-Security-Policy of each lets it load nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from starlette.responses import HTMLResponse, Response

_COMMON = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
_NO_FRAMES = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# The report is a page made from the user's data: in its sandbox it has no origin, so nothing in it can call the API.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; font-src data:; "
    f"{_NO_FRAMES}; sandbox allow-scripts allow-downloads allow-popups"
)


def page() -> Response:
    """Return the page that classifies."""
    return _page("index.html")


def chat() -> Response:
    """Return the page that chats."""
    return _page("chat.html")


def label() -> Response:
    """Return the page that annotates."""
    return _page("label.html")


def _page(name: str) -> Response:
    """Return a page; its inline script and style are allowed by their hashes, nothing else is."""
    web = files("alambic") / "web"
    text = (web / name).read_text("utf-8").replace("/* base.css */", (web / "base.css").read_text("utf-8"))
    policy = (
        f"default-src 'none'; script-src {_hashes(text, 'script')}; style-src {_hashes(text, 'style')}; "
        f"connect-src 'self'; img-src data:; {_NO_FRAMES}"
    )
    return HTMLResponse(text, headers={**_COMMON, "Content-Security-Policy": policy})


def report(path: Path) -> Response:
    """Return the report at `path`."""
    return HTMLResponse(path.read_bytes(), headers={**_COMMON, "Content-Security-Policy": _REPORT_POLICY})


def _hashes(text: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
