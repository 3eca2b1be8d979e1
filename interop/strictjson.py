"""JSON from untrusted files: of bounded size and depth, without duplicate keys, in text that can be written again."""

import json
from typing import Any

MAX_BYTES = 1 << 24  # 16 MiB; the header of an adapter with 10,000 adapted layers takes 4
MAX_DEPTH = 64


class JSONError(ValueError):
    """The text is no JSON object, or one that nobody writes in good faith."""


def parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object, in time and memory that are proportional to its text.

    Raises:
        JSONError: the text is too long, is nested too deeply, has a key twice, or is no JSON object in UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise JSONError(f"has {len(content):,d} bytes of JSON, {MAX_BYTES:,d} are allowed")
    try:
        value = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except JSONError:
        raise
    except RecursionError:
        raise JSONError(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise JSONError(f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise JSONError(f"holds a JSON {type(value).__name__}, not an object")
    _check(value)
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise JSONError(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _no_constant(name: str) -> None:
    raise JSONError(f"holds {name}, which is no JSON")


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
                    raise JSONError(f"holds the text {item!r}, which is not valid Unicode") from None
        level = inside
