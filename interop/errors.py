"""The one exception that a bad adapter file raises, and the form of a message with several findings."""

MAX_LISTED = 8


class AdapterFormatError(ValueError):
    """An adapter file is incomplete, inconsistent or unsafe, or was written for another base model."""


def bulleted(headline: str, lines: list[str]) -> str:
    """`headline:` and the findings below it, one a line; a long list is cut and its rest counted."""
    shown = lines[:MAX_LISTED] + [f"... and {len(lines) - MAX_LISTED} more"] * (len(lines) > MAX_LISTED)
    return headline + ":" + "".join(f"\n  - {line}" for line in shown)
