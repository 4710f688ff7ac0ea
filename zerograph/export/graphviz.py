"""A plan as a drawing for graphviz: a cluster a block, a node a collective, repeated layers folded.

    zerograph ... > plan.dot; dot -Tsvg plan.dot > plan.svg

Forward runs down, backward up. A gather points to the part that reads it, a part to the reductions that
take its gradients. All reductions meet in the norm, where there is one, and it points to the updates.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from zerograph.blocks import Block, Collective, Part, blocks_of, folded_name, folds
from zerograph.document import Document
from zerograph.report.colours import collective_colours
from zerograph.units import duration, operations, size

HEAD = (
    'graph [fontname="Helvetica", fontsize=11, style="rounded", color="#c9c9c2", nodesep=0.2]',
    'node [fontname="Helvetica", fontsize=10, shape=box, style="rounded", color="#5d636d"]',
    'edge [color="#5d636d", arrowsize=0.6]',
)


def dot(document: Document, *, fold: bool = True) -> str:
    """A digraph in the DOT language; `fold=False` draws every layer."""
    blocks = blocks_of(document)
    runs = folds(blocks, lambda b: b.name, lambda b: b.shape) if fold else [[b] for b in blocks]
    colours = {k: light for k, (light, _) in collective_colours(document.traffic).items()}
    title = f"{document.model}, stage {document.stage}, {document.world} ranks"
    body = [*HEAD, f"label={_quoted(title)}", "labelloc=t"]
    for index, run in enumerate(runs):
        body += _cluster(index, run, colours)
    body += _edges(runs)
    return "\n".join(["digraph zerograph {", *(f"  {line}" for line in body), "}"]) + "\n"


def _cluster(index: int, run: Sequence[Block], colours: dict[str, str]) -> Iterator[str]:
    times = f" x {len(run)}" if len(run) > 1 else ""
    name = folded_name([block.name for block in run]) or "the whole model"
    yield f"subgraph cluster_{index} {{"
    yield f"  label={_quoted(name + times)}"
    for region, part in run[0].parts.items():
        yield f"  {_part(index, region)} [label={_quoted(_words(region, part))}]"
        for at, each in enumerate(part.collectives):
            colour = colours[each.kind]
            yield (
                f"  {_collective(index, region, at)} [label={_quoted(_label(each, run))}, "
                f'shape=ellipse, style=filled, fillcolor="{colour}", color="{colour}", '
                'fontcolor="white"]'
            )
    yield "}"


def _words(region: str, part: Part) -> str:
    flops = operations(part.flops) if part.flops else ""
    seconds = duration(part.seconds) if part.seconds else ""
    return "\n".join(filter(None, (region, flops, seconds)))


def _label(each: Collective, run: Sequence[Block]) -> str:
    bucket = each.bucket if len(run) == 1 else "each"
    return f"{each.kind}\n{size(each.nbytes)} {bucket}".strip()


def _edges(runs: Sequence[Sequence[Block]]) -> Iterator[str]:
    chain = [(i, run[0]) for i, run in enumerate(runs) if run[0].name]
    for index, run in enumerate(runs):
        yield from _inside(index, run[0])
    forward = [_part(i, "forward") for i, block in chain if "forward" in block.parts]
    backward = [_part(i, "backward") for i, block in chain if "backward" in block.parts]
    yield from (f"{a} -> {b}" for a, b in pairwise(forward))
    yield from (f"{a} -> {b} [dir=back]" for a, b in pairwise(backward))
    yield from (f"{a} -> {b} [constraint=false]" for a, b in zip(forward[-1:], backward[-1:]))
    whole = next((i for i, run in enumerate(runs) if not run[0].name), None)
    if whole is not None and "step" in runs[whole][0].parts:
        yield from _norm(whole, chain)


def _inside(index: int, block: Block) -> Iterator[str]:
    """A gather before its part; other collectives after it."""
    for region, part in block.parts.items():
        for at, each in enumerate(part.collectives):
            ends = [_collective(index, region, at), _part(index, region)]
            yield " -> ".join(ends if each.kind == "gather" else reversed(ends))


def _norm(whole: int, chain: Sequence[tuple[int, Block]]) -> Iterator[str]:
    norm = _part(whole, "step")
    for index, block in chain:
        part = block.parts.get("backward")
        for at, each in enumerate(part.collectives if part else ()):
            if each.kind != "gather":
                yield f"{_collective(index, 'backward', at)} -> {norm} [style=dashed]"
        if "step" in block.parts:
            yield f"{norm} -> {_part(index, 'step')} [style=dashed, constraint=false]"


def _part(index: int, region: str) -> str:
    return f"b{index}_{region}"


def _collective(index: int, region: str, at: int) -> str:
    return f"b{index}_{region}_{at}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
