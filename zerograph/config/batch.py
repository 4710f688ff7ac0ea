"""Batch arithmetic: train_batch_size = micro batch x accumulation x world size.

Any one of the three that is absent is solved from the others, by DeepSpeed's rules:

    train, micro          accumulation = train / (micro x world)
    train, accumulation   micro        = train / (accumulation x world)
    micro, accumulation   train        = micro x accumulation x world
    train                 accumulation = 1, micro = train / world
    micro                 accumulation = 1, train = micro x world
    accumulation          an error
    none                  micro unknown until the first batch, accumulation 1 (DeepSpeed fails)

Where DeepSpeed divides, rounds down and then finds that the product is wrong, the error here names
the division that is not whole.
"""

from dataclasses import dataclass

from zerograph.errors import ConfigError

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
STEPS = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
    """The three batch numbers; the sizes are None when the config gives none of the three."""

    train_batch_size: int | None
    micro_batch_size: int | None
    accumulation: int


def solve(train: int | None, micro: int | None, steps: int | None, world_size: int) -> Batch:
    """Solve for what is absent and check what is given."""
    if world_size < 1:
        raise ConfigError(f"world_size must be at least 1, got {world_size}")
    if train is None:
        return _from_parts(micro, steps, world_size)
    if micro is None:
        steps = 1 if steps is None else steps
        given = {STEPS: steps, "world_size": world_size}
        return Batch(train, _divide(train, given, MICRO), steps)
    if steps is None:
        given = {MICRO: micro, "world_size": world_size}
        return Batch(train, micro, _divide(train, given, STEPS))
    return _checked(train, micro, steps, world_size)


def _from_parts(micro: int | None, steps: int | None, world_size: int) -> Batch:
    if micro is None and steps is not None:
        raise ConfigError(
            f"{STEPS}={steps} does not say how large a batch is; give {TRAIN} or {MICRO} too"
        )
    steps = 1 if steps is None else steps
    return Batch(None if micro is None else micro * steps * world_size, micro, steps)


def _divide(train: int, given: dict[str, int], unknown: str) -> int:
    product = 1
    for value in given.values():
        product *= value
    if train % product == 0:
        return train // product
    names = " x ".join(f"{name}={value}" for name, value in given.items())
    raise ConfigError(
        f"{TRAIN}={train} is not a multiple of {names} (= {product}), so {unknown} cannot be "
        f"solved; make {TRAIN} a multiple of {product}, or give {unknown} instead of {TRAIN}"
    )


def _checked(train: int, micro: int, steps: int, world_size: int) -> Batch:
    product = micro * steps * world_size
    if train == product:
        return Batch(train, micro, steps)
    raise ConfigError(
        f"{TRAIN}={train} is not {MICRO}={micro} x {STEPS}={steps} x world_size={world_size} "
        f"(= {product}); make them agree, or leave one of the three out"
    )
