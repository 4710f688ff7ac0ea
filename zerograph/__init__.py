"""zerograph: ZeRO as a compiler pass for PyTorch."""

from zerograph.access import gathered
from zerograph.config import ZeroConfig, load_config
from zerograph.engine import Engine, compile
from zerograph.integrations.deepspeed import add_config_arguments, initialize
from zerograph.plan import Plan, plan
from zerograph.runtime.record import record
from zerograph.runtime.world import init_distributed

__all__ = [
    "Engine",
    "Plan",
    "ZeroConfig",
    "add_config_arguments",
    "compile",
    "gathered",
    "init_distributed",
    "initialize",
    "load_config",
    "plan",
    "record",
]
