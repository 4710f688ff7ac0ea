"""Static costs of a TrainGraph, for one rank. No rank, no device, no measurement is needed.

traffic.py    bytes of values; collectives by kind
lifetimes.py  which storage a value lies in, and how long that is alive
memory.py     bytes held, by what they are for and by module, and the peak
work.py       FLOPs and bytes of memory traffic of each node
cluster.py    described machines: devices, links, and the time of a collective on them
timeline.py   when each node starts and ends
"""

from zerograph.cost.cluster import CLUSTERS, Cluster, Device, Link, cluster_of
from zerograph.cost.memory import CATEGORIES, Held, Memory, Moment, memory_of, peak_gathered
from zerograph.cost.timeline import STREAMS, Span, Timeline, timeline_of
from zerograph.cost.traffic import (
    Traffic,
    collective_bytes,
    moved_bytes,
    name_of,
    nbytes,
    op_of,
    traffic_of,
)
from zerograph.cost.work import Work, work_of

__all__ = [
    "CATEGORIES",
    "CLUSTERS",
    "STREAMS",
    "Cluster",
    "Device",
    "Held",
    "Link",
    "Memory",
    "Moment",
    "Span",
    "Timeline",
    "Traffic",
    "Work",
    "cluster_of",
    "collective_bytes",
    "memory_of",
    "moved_bytes",
    "name_of",
    "nbytes",
    "op_of",
    "peak_gathered",
    "timeline_of",
    "traffic_of",
    "work_of",
]
