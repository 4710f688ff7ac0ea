"""Colours: one for each collective and category of memory, the same in the report and in the drawings.

Each is a pair for light and dark ground. Kinds that are not listed take `SPARE` in order of appearance.
"""

from collections.abc import Iterable

Pair = tuple[str, str]

COLLECTIVES: dict[str, Pair] = {
    "gather": ("#2f66c4", "#6b9bf0"),
    "gather_activation": ("#1f7a4d", "#57c08e"),
    "refresh": ("#0f8b9d", "#45bccd"),
    "gather_partials": ("#7b57c2", "#a78bea"),
    "reduce_scatter": ("#c8681a", "#ef9a4e"),
    "all_reduce": ("#bf3b3b", "#ee7a75"),
    "any_rank": ("#a8467f", "#de82b6"),
    "sum_weights": ("#6c7a12", "#b3c04d"),
    "gather_norms": ("#54708c", "#8fb0cf"),
}
MEMORY: dict[str, Pair] = {
    "parameters": ("#4c5a70", "#8393ad"),
    "optimizer": ("#7f8ba0", "#5f6d85"),
    "buffers": ("#b9b09c", "#8f8875"),
    "gradients": ("#dd9253", "#d98c4b"),
    "inputs": ("#c2b280", "#b6a873"),
    "gathered": ("#5c8bdc", "#5f8fe4"),
    "activations": ("#5fa37a", "#5fae80"),
}
STREAMS: dict[str, Pair] = {
    "products": ("#586274", "#a5afc0"),
    "compute": ("#a9b0bb", "#666e7c"),
    "copy": ("#3f8f5f", "#68bd89"),
}
"""Compute that does FLOPs ("products"), all other compute, and copies between devices."""
SPARE: tuple[Pair, ...] = (
    ("#8a5a44", "#c4937c"),
    ("#3d7d7a", "#74b5b1"),
    ("#95527a", "#c98bb0"),
    ("#6d6d2f", "#a9a965"),
)


def collective_colours(kinds: Iterable[str]) -> dict[str, Pair]:
    """The colours of `kinds`, in the order of COLLECTIVES; one for a kind, whatever its axis."""
    return _coloured(COLLECTIVES, map(kind_of, kinds))


def kind_of(name: str) -> str:
    """`gather` for `gather over node`."""
    return name.partition(" over ")[0]


def memory_colours(categories: Iterable[str]) -> dict[str, Pair]:
    """The colours of `categories`, in their own order."""
    found = tuple(categories)
    colours = _coloured(MEMORY, found)
    return {name: colours[name] for name in found}


def _coloured(known: dict[str, Pair], names: Iterable[str]) -> dict[str, Pair]:
    found = dict.fromkeys(names)
    more = [name for name in found if name not in known]
    spare = {name: SPARE[i % len(SPARE)] for i, name in enumerate(more)}
    return {name: pair for name, pair in known.items() if name in found} | spare
