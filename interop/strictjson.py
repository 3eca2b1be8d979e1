"""JSON from untrusted files: of bounded size and depth, without duplicate keys, in text that can be written again."""

import json
import math
from typing import Any

from interop.errors import legible

MAX_BYTES = 1 << 24  # 16 MiB; the header of an adapter with 10,000 adapted layers takes 4
MAX_DEPTH = 64
MAX_DIGITS = 4000
MAX_MARKS = 1 << 20  # commas and opening brackets: what values take in memory is up to 30 times their text


class JSONError(ValueError):
    """The text is no JSON object, or one that nobody writes in good faith."""


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object, in time and memory that are proportional to its text.

    Raises:
        JSONError: the text is too long, is nested too deeply, has a key twice, or is no JSON object in UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise JSONError(f"has {len(content):,d} bytes of JSON, {MAX_BYTES:,d} are allowed")
    marks = sum(map(content.count, (b",", b"[", b"{")))
    if marks > MAX_MARKS:
        raise JSONError(f"has {marks:,d} commas and brackets, {MAX_MARKS:,d} are allowed")
    try:
        value = _DECODER.decode(content.decode("utf-8-sig"))
    except JSONError:
        raise
    except RecursionError:
        raise JSONError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise JSONError(f"is not valid JSON ({legible(error)})") from error
    if not isinstance(value, dict):
        raise JSONError(f"holds a JSON {type(value).__name__}, not an object")
    _check(value)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JSONError(f"has the key {legible(repr(name))} twice")
            seen.add(name)
    return found


def _no_constant(name: str) -> None:
    raise JSONError(f"holds {name}, which is no JSON")


def _int(text: str) -> int:
    if text == "-0":  # to other readers, a float
        raise JSONError("holds -0, which is no integer")
    if len(text) > MAX_DIGITS:  # Python's own limit, which a program may have lifted
        raise JSONError(f"holds an integer of {len(text):,d} digits, {MAX_DIGITS:,d} are allowed")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JSONError(f"holds {legible(text)}, which is too large for a float")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_int=_int, parse_float=_float
)


def _check(value: Any) -> None:
    """Bound the depth, and refuse text that cannot be encoded, such as half a surrogate pair."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise JSONError(f"is nested more than {MAX_DEPTH} levels deep")
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list):
                inside += item
            elif isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise JSONError(f"holds the text {legible(repr(item))}, which is not valid Unicode") from None
        level = inside
