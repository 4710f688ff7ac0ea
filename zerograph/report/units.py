"""Numbers as a person reads them. Bytes and seconds are `zerograph.text.size` and `duration`."""


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
