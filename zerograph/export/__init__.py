"""Traces and drawings of a Document for the tools that people already use.

chrome.py   Trace Event Format, for Perfetto (ui.perfetto.dev) and chrome://tracing
graphviz.py DOT, for `dot -Tsvg`
"""

from zerograph.export.chrome import chrome_trace
from zerograph.export.graphviz import dot

__all__ = ["chrome_trace", "dot"]
