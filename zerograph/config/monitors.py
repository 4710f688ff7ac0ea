"""The sections that watch training without changing it: loggers, profilers, timers."""

from typing import Annotated

from pydantic import Field

from zerograph.config.base import Count, Integer, NotNegative, Section


class TensorBoard(Section):
    """Scalars to TensorBoard."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class CsvMonitor(Section):
    """Scalars to CSV files."""

    enabled: bool = False
    output_path: str = ""
    job_name: str = "DeepSpeedJobName"


class Wandb(Section):
    """Scalars to Weights & Biases."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class Comet(Section):
    """Scalars to Comet."""

    enabled: bool = False
    samples_log_interval: Count = 100
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = Field(default=None, repr=False)
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


class FlopsProfiler(Section):
    """Floating-point operations per module, once."""

    enabled: bool = False
    recompute_fwd_factor: NotNegative = 0.0
    profile_step: Count = 1
    module_depth: Integer = -1
    top_modules: Count = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLogger(Section):
    """Each collective with its size and time."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: Annotated[tuple[str, ...], Field(strict=False)] = ()
    verbose: bool = False
    debug: bool = False


class ThroughputTimer(Section):
    """Samples per second."""

    enabled: bool = True
    synchronized: bool = True


class Timers(Section):
    """The timers that DeepSpeed keeps."""

    throughput: ThroughputTimer = ThroughputTimer()
