"""One pass a file; the file's name is the pass's name in logs, on the command line and in goldens."""

from zerograph.passes.arena import Arena
from zerograph.passes.bracket import Bracket
from zerograph.passes.checkpoint import Checkpoint
from zerograph.passes.gather import Gather
from zerograph.passes.in_place import InPlace
from zerograph.passes.normalize import Normalize
from zerograph.passes.offload import Offload
from zerograph.passes.partition import Partition
from zerograph.passes.reduce import Reduce
from zerograph.passes.release import Release
from zerograph.passes.scale import Scale
from zerograph.passes.schedule import Schedule
from zerograph.passes.shard import Shard
from zerograph.passes.specialize import Specialize
from zerograph.passes.update import Update
from zerograph.passes.update_in_backward import UpdateInBackward

__all__ = [
    "Arena",
    "Bracket",
    "Checkpoint",
    "Gather",
    "InPlace",
    "Normalize",
    "Offload",
    "Partition",
    "Reduce",
    "Release",
    "Scale",
    "Schedule",
    "Shard",
    "Specialize",
    "Update",
    "UpdateInBackward",
]
