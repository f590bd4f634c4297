"""Numbers as people read them."""

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Say how long something took: `12.3 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def number(value: float, *, power: bool | None = None, digits: int = 4) -> str:
    """Write a number with `digits` digits that count: `0.912`, `128`, `3e-4`.

    `power`: as a multiple of a power of ten, or (`None`) only where it is very small or large.
    """
    if power is None:
        power = value != 0 and not 1e-3 <= abs(value) < 1e6
    if not power or value == 0:
        return f"{value:.{max(digits, len(f'{abs(value):.0f}'))}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def numbers(values: Sequence[float]) -> list[str]:
    """Write the numbers along an axis, all of them in the same way."""
    sizes = [abs(value) for value in values if value]
    power = bool(sizes) and (min(sizes) < 1e-3 or max(sizes) >= 1e6)
    for digits in range(3, 9):
        texts = [number(value, power=power, digits=digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts
