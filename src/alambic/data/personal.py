"""Likely personal data in a text, by shape and checksum. It finds and counts; it changes nothing and keeps no value.

What has a checksum (IBAN, card number, French NIR) is checked, so that an order number is not taken for one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

KINDS = ("email", "phone", "iban", "card", "nir", "ip")

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?:[ ]?[A-Z0-9]{1,4}){3,9}\b")
_NIR = re.compile(r"(?<!\d)[1278] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}(?!\d)")
_CARD = re.compile(r"(?<![\d-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\d-])")
_PHONE_FR = re.compile(r"(?<![\w+])(?:\+33|0033|0)[ .]?(?:\(0\)[ .]?)?[1-9](?:[ .\-\u00a0\u202f]?\d{2}){4}(?!\d)")
_PHONE_INTL = re.compile(r"(?<![\w+])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,6}(?!\d)")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
# Lengths from the IBAN registry, of the countries of SEPA and a few neighbours.
_IBAN_LENGTHS = {
    "AD": 24, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24,
    "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IS": 26, "IT": 27, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "TN": 24, "TR": 26, "VA": 22,
}  # fmt: skip


def find_personal(text: str) -> dict[str, int]:
    """Count the likely personal data in `text`, by kind of `KINDS`; kinds not found are absent."""
    found: dict[str, int] = {}
    if "@" not in text and sum(c.isdigit() for c in text) < 4 and text.count(":") < 2:
        return found
    # What is found is blanked, so that a card number is not counted again as a telephone number.
    for kind, pattern, valid in _DETECTORS:
        for match in list(pattern.finditer(text)):
            if valid(match[0]):
                found[kind] = found.get(kind, 0) + 1
                text = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
    return found


def is_iban(value: str) -> bool:
    """Tell whether `value` begins with an IBAN: known country, its length, right check digits."""
    compact = value.replace(" ", "")
    compact = compact[: _IBAN_LENGTHS.get(compact[:2], 0)]
    if not compact or len(compact) != _IBAN_LENGTHS[compact[:2]]:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card(value: str) -> bool:
    """Tell whether `value` has 13 to 19 digits, not all alike, that pass the Luhn check."""
    digits = [int(c) for c in value if c.isdigit()]
    doubled = sum(sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + doubled) % 10 == 0


def is_nir(value: str) -> bool:
    """Tell whether `value` is a French social security number (15 characters) with the right key."""
    compact = value.replace(" ", "")
    number = compact[:13].replace("2A", "19").replace("2B", "18")
    if len(compact) != 15 or not number.isdigit():
        return False
    return 97 - int(number) % 97 == int(compact[13:])


def _is_phone(value: str) -> bool:
    return 9 <= sum(c.isdigit() for c in value) <= 15


def _is_ip(value: str) -> bool:
    if sum(c.isalnum() for c in value) < 4:
        return False
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _always(value: str) -> bool:
    return bool(value)


_DETECTORS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, _always),
    ("iban", _IBAN, is_iban),
    ("nir", _NIR, is_nir),
    ("card", _CARD, is_card),
    ("phone", _PHONE_FR, _is_phone),
    ("phone", _PHONE_INTL, _is_phone),
    ("ip", _IPV4, _is_ip),
    ("ip", _IPV6, _is_ip),
)
