"""Numbers as a person reads them, with a unit. No torch: whatever prints may import it."""


def size(count: int) -> str:
    """Bytes with a binary unit: `640 B`, `3.2 MiB`."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if value < 1024 or unit == units[-1]:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds with a unit, to three digits: `12.3 ms`, `1.20 s`."""
    value, units = seconds * 1e6, ("us", "ms", "s")
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError


def count(number: int) -> str:
    """`855.7 M`: a number of elements."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def operations(flops: int) -> str:
    """`7.0 TFLOP`."""
    for power, name in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "K")):
        if flops >= 10**power:
            return f"{flops / 10**power:.1f} {name}FLOP"
    return f"{flops} FLOP"


def percent(part: int, whole: int) -> str:
    """`12.5 %`; `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
