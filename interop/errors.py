"""The one exception that a bad adapter file raises, and the form of messages that quote untrusted files."""

MAX_LISTED = 8
MAX_QUOTED = 400  # characters of a line


class AdapterFormatError(ValueError):
    """An adapter file is incomplete, inconsistent or unsafe, or was written for another base model."""


def bulleted(headline: str, lines: list[str]) -> str:
    """`headline:` and the findings below it, one a line; a long list is cut and its rest counted."""
    shown = [legible(line) for line in lines[:MAX_LISTED]]
    shown += [f"... and {len(lines) - MAX_LISTED} more"] * (len(lines) > MAX_LISTED)
    return headline + ":" + "".join(f"\n  - {line}" for line in shown)


def legible(text: object) -> str:
    """One line that quotes a file: short, and without characters that a terminal would obey."""
    line = str(text)
    if len(line) > MAX_QUOTED:
        line = f"{line[: MAX_QUOTED * 3 // 4]} ... {line[-MAX_QUOTED // 4 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
