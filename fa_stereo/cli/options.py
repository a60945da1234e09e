"""Values of options that several commands take."""

from __future__ import annotations

from collections.abc import Sequence

from fa_stereo.errors import InputError


def parse_names(text: str, choices: Sequence[str] | None, option: str) -> tuple[str, ...]:
    """Return the names in a list separated by commas, each once.

    Args:
        text: The list.
        choices: What they may be; None for anything.
        option: Whose value it is, for the message.

    Raises:
        InputError: One is unknown, or none is given.

    Examples:
        >>> parse_names("fp32, bf16,fp32", ("fp32", "bf16"), "--precisions")
        ('fp32', 'bf16')
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if choices is not None and name not in choices]
    if unknown or not names:
        known = f"any of {','.join(choices)}" if choices else "a list of names"
        raise InputError(f"{option} takes {known}, got {unknown[0] if unknown else text!r}")
    return names


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of a size such as 544x960.

    Raises:
        InputError: It is none.

    Examples:
        >>> parse_size("544x960")
        (544, 960)
    """
    height, _, width = text.strip().lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"a size is HEIGHTxWIDTH, 544x960 for example, got {text!r}")
    return int(height), int(width)
