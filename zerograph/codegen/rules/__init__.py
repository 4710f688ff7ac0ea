"""Optimizer rules, each described once in a file of its own: options, states, host scalars, elements.

    ADAMW.scalars            names of the columns of the table of scalars
    ADAMW.host(options, 3)   one row of it for the third step, float64 on the host
    ADAMW.body(k, flags)     what happens to each element; see expr.py

This file is the table of them and what others import; what a rule is, is in rule.py. Printing is expr.py's,
kernels are spec.py's.
"""

from zerograph.codegen.rules.adagrad import ADAGRAD
from zerograph.codegen.rules.adam import ADAM, ADAMW
from zerograph.codegen.rules.lamb import LAMB
from zerograph.codegen.rules.lion import LION
from zerograph.codegen.rules.rule import TINY, Body, Described, Flags, Kind, Options, Run
from zerograph.codegen.rules.sgd import SGD

__all__ = [
    "ADAGRAD",
    "ADAM",
    "ADAMW",
    "LAMB",
    "LION",
    "RULES",
    "SGD",
    "TINY",
    "Body",
    "Described",
    "Flags",
    "Kind",
    "Options",
    "Run",
    "rule_of",
]

RULES = {rule.name: rule for rule in (ADAMW, ADAM, SGD, ADAGRAD, LION, LAMB)}


def rule_of(label: str) -> Described | None:
    """The rule that a plan names with its flags ("sgd|sgd.momentum"); None for a user's own class."""
    return RULES.get(label.partition("|")[0].partition(".")[0])
