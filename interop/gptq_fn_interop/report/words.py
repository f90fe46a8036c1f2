"""Numbers and values of JSON as the page shows them."""

import math
from typing import Any


def percent(value: float | None) -> str:
    """A relative error in per cent to two digits, without the sign: for narrow places."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if abs(value) >= 0.0995:
        return f"{100 * value:.0f}"
    return f"{100 * value:#.2g}" if abs(value) >= 0.0001 else f"{100 * value:.1g}"


def per_cent(value: float | None) -> str:
    """A relative error in per cent to three digits, with the sign."""
    if value is None or not math.isfinite(value):
        return "unknown"
    if abs(value) >= 0.0995:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.2f} %" if abs(value) >= 0.0001 or not value else f"{100 * value:.1g} %"


def figure(value: Any) -> str:
    """A number to four digits."""
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def whole(value: float | None) -> str:
    """A whole number."""
    return "unknown" if value is None else f"{value:,}"


def value_of(value: Any, missing: str = "none") -> str:
    """Any value of JSON; `missing` for null and what is empty."""
    if value is None or value in ("", [], {}):
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_of(of_it)}" for key, of_it in value.items())
    if isinstance(value, list):
        return ", ".join(map(value_of, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10000 else figure(value)


def size_of(size: float) -> str:
    """A number of bytes."""
    for unit, of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= of_it:
            return f"{size / of_it:.1f} {unit}" if size < 100 * of_it else f"{size / of_it:.0f} {unit}"
    return f"{size:.0f} bytes"


def time_of(seconds: Any) -> str:
    """A time in seconds."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        return "unknown"
    if seconds < 119.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
