"""Which encoding a text file is in, decided from its bytes.

A byte order mark decides; then UTF-16 without one; then UTF-8, checked over the whole file; then Windows-1252 (the
usual French export) when the text reads like a western language; then charset-normalizer, where it is installed.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from alambic import _extras
from alambic.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 1 << 20
_SAMPLE = 1 << 18
_WESTERN = frozenset(
    "àâäáãåæçéèêëíìîïñóòôöõøœúùûüýÿßÀÂÄÁÃÅÆÇÉÈÊËÍÎÏÑÓÔÖÕØŒÚÙÛÜŸ\xa0\xad«»‘’‚“”„–—…•€£°²³´·¡¿§©®™ºª½¼±×µ†‰‹›"
)


def detect(path: Path) -> str:
    """Return the name of the encoding of the file at `path`; ``utf-8`` for plain ASCII."""
    with path.open("rb") as file:
        head = file.read(_SAMPLE)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    wide = _utf16_without_mark(head)
    if wide is not None:
        return wide
    valid, invalid, sample = _survey(path)
    # A few broken lines in a UTF-8 file are bad rows, not another encoding.
    return "utf-8" if valid >= invalid else _legacy(sample)


def check_name(name: str) -> str:
    """Return Python's spelling of an encoding named by the user.

    Raises:
        DataError: there is no such text encoding.
    """
    try:
        codec = codecs.lookup(name)
        b"\0\0\0\0".decode(name, "replace")  # refuses codecs that do not give text
    except (LookupError, ValueError) as error:
        hint = "use utf-8, utf-16, latin-1 or cp1252, or leave it out to have it detected"
        raise DataError(f"data.encoding: unknown encoding {name!r}", hint=hint) from error
    return "utf-8-sig" if codec.name == "utf-8" else codec.name


def _utf16_without_mark(head: bytes) -> str | None:
    if len(head) < 4:
        return None
    even, odd = head[0::2].count(0) / (len(head) / 2), head[1::2].count(0) / (len(head) / 2)
    if odd > 0.4 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.4 and odd < 0.05 else None


def _survey(path: Path) -> tuple[int, int, bytes]:
    """Count non-ASCII lines that are and are not UTF-8, and keep a sample of those that are not."""
    valid, invalid, sample = 0, 0, bytearray()
    for block in _blocks(path):
        if block.isascii():
            continue
        for line in block.split(b"\n"):
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
                valid += 1
            except UnicodeDecodeError:
                invalid += 1
                if len(sample) < _SAMPLE:
                    sample += line[:_SAMPLE] + b"\n"
    return valid, invalid, bytes(sample)


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the file in blocks that end at a line end, so that no character is cut in two."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block + file.readline()


def _legacy(sample: bytes) -> str:
    if _reads_western(sample):
        return "cp1252"
    if _extras.available("charset_normalizer"):
        best = _extras.load("charset_normalizer").from_bytes(sample).best()
        if best is not None:
            return str(best.encoding)
    try:
        sample.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"


def _reads_western(sample: bytes) -> bool:
    """Tell whether the sample, read as Windows-1252, has the accents of a western language in a usual proportion."""
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        return False
    special = [c for c in text if not c.isascii()]
    letters = sum(c.isalpha() for c in text)
    accented = sum(c.isalpha() for c in special)
    return sum(c in _WESTERN for c in special) >= 0.9 * len(special) and accented <= 0.4 * max(letters, 1)
