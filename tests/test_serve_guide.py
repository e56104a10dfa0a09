"""The guide says what the server does: every option and every error code it names exists, and none is left out."""

from __future__ import annotations

import re
from pathlib import Path

from alambic.cli.serve import serve

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guides" / "serve.md").read_text("utf-8")


def test_guide_names_every_option_when_read() -> None:
    options = {option for parameter in serve.params for option in parameter.opts if option.startswith("--")}
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", GUIDE)) == options


def test_guide_names_every_error_code_when_read() -> None:
    # The page of `alambic label` is the only client of annotate.py.
    files = [path for path in (ROOT / "src" / "alambic" / "serve").glob("*.py") if path.name != "annotate.py"]
    source = "".join(path.read_text("utf-8") for path in files)
    codes = set(re.findall(r'ApiError\(\s*\d{3},\s*"([a-z_]+)"', source)) | {"invalid_api_key", "missing_api_key"}
    table = GUIDE.partition("## Errors")[2].partition("## ")[0]
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", table))
    assert named == codes
