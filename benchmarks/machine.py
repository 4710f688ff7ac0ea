"""What a result was measured on: processor, cores and versions; no names, no paths."""

import datetime
import os
import platform
import resource
import sys
from importlib import metadata


def describe() -> dict[str, object]:
    """The machine and the versions that matter, ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "date": datetime.date.today().isoformat(),
    }


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_model() -> str:
    """The processor's name and, as virtual machines shorten it, its family and model numbers."""
    try:
        with open("/proc/cpuinfo") as lines:
            pairs = [line.split(":", 1) for line in lines if ":" in line]
    except OSError:
        return platform.processor() or "unknown"
    found = {key.strip(): value.strip() for key, value in reversed(pairs)}
    name = found.get("model name", platform.machine())
    return f"{name} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"
