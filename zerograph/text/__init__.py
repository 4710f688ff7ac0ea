"""Canonical text: a TrainGraph as lines that a person can read, diff and keep as a golden.

Values of aten ops are numbered in order; zero.* values carry their bucket's or parameter's name, so that a
gather more or less renumbers nothing. One node a line, keyword arguments sorted, no paths, ids, times,
ranks or names that torch made up. The summary comes last. The skeleton form folds runs of aten ops.

names.py   the name of every value
nodes.py   one node as a line
graph.py   the whole graph
"""

from zerograph.text.graph import forms, lines, summary, text
from zerograph.text.nodes import Line

__all__ = ["Line", "forms", "lines", "summary", "text"]
