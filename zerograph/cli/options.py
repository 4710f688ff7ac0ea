"""How a model is planned: the options that several commands share."""

from dataclasses import dataclass, field
from typing import Annotated

import typer

from zerograph.planning import data_parallel_of

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="module:factory, or a config of transformers: a config.json, or a class and its arguments.",
    ),
]
Target = Annotated[
    str, typer.Argument(metavar="PLAN|MODEL", help="A saved plan, or what `zerograph plan` takes.")
]
Config = Annotated[
    str | None, typer.Option("--config", "-c", metavar="JSON", help="The DeepSpeed config.")
]
Skeleton = Annotated[
    bool, typer.Option("--skeleton", help="Fold runs of aten operators into one line.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[
    str | None, typer.Option("-o", "--output", metavar="FILE", help="Write it here.")
]


@dataclass(frozen=True)
class Options:
    """What a plan depends on besides the model and the config."""

    world_size: Annotated[int, typer.Option(help="Ranks.")] = 1
    model_parallel: Annotated[
        int,
        typer.Option(help="Of these, how many compute one batch together, each with its part."),
    ] = 1
    batch: Annotated[
        int | None, typer.Option(help="Micro-batch of a rank; by default what the config says.")
    ] = None
    seq: Annotated[
        int | None,
        typer.Option(help="Tokens in a row; by default the model's limit, at most 2048."),
    ] = None
    input: Annotated[
        list[str],
        typer.Option(metavar="NAME=DTYPE[SHAPE]", help="An input of the forward: x=f32[4,16]."),
    ] = field(default_factory=list)
    device: Annotated[str, typer.Option(help="The device type that is planned for.")] = "cpu"
    cluster: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The machines whose time is predicted.")
    ] = "h100"

    @property
    def data_parallel(self) -> int:
        """How many ranks have the same part of the model. Raises PlanError."""
        return data_parallel_of(self.world_size, self.model_parallel)
