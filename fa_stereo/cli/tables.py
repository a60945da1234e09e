"""Tables for the terminal that are Markdown as well."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table whose columns are aligned; the first ``left`` of them to the left.

    Examples:
        >>> print(markdown_table(["part", "time"], [["network", "1.06 s"], ["regression", "90 ms"]]))
        | part       |   time |
        |------------|-------:|
        | network    | 1.06 s |
        | regression |  90 ms |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return f"| {' | '.join(c.ljust(width) if i < left else c.rjust(width) for i, (c, width) in columns)} |"

    rule = "|".join("-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def duration(seconds: float) -> str:
    """Return a time for people, in three digits or so.

    Examples:
        >>> duration(0.0905), duration(1.06), duration(13)
        ('90.5 ms', '1.06 s', '13.0 s')
    """
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
