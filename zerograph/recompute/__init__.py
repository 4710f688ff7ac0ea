"""What to keep of the forward, and what to compute again in the backward. No rank, no device, no tensor.

problem.py  a graph's forward as operators and values with their costs and bytes
pieces.py   the parts that can be decided one by one
exact.py    all best choices of a part, by dynamic programming
cut.py      of a part with too many choices: those of minimum cuts
curve.py    bytes kept against cost repeated: sums of curves
choose.py   the choice for a budget
peak.py     how much is alive at once with a choice
regions.py  into how many regions to cut the blocks, whose boundaries are then kept
budget.py   the config's key for the pass `checkpoint`
"""

from zerograph.recompute.budget import Budget
from zerograph.recompute.choose import Choice, Chooser, choose
from zerograph.recompute.regions import Auto

__all__ = ["Auto", "Budget", "Choice", "Chooser", "choose"]
