"""The model's parameters as the engine took them over, to notice at a call what has become of them."""

from dataclasses import dataclass

from torch import nn

from zerograph.errors import PlanError


@dataclass(frozen=True)
class Parameters:
    """Which tensors a model's parameters are, by name, and which of them are to be trained."""

    tensors: tuple[tuple[str, int], ...]
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        found = list(model.named_parameters())
        return cls(
            tuple((name, id(tensor)) for name, tensor in found),
            tuple(tensor.requires_grad for _, tensor in found),
        )

    def changes(self, now: "Parameters", pending: bool) -> str:
        """In a few words what was frozen and unfrozen from `self` to `now`.

        Raises PlanError if parameters were added, removed or replaced, which needs another engine, or if
        some were frozen or unfrozen while gradients of an accumulation are `pending`.
        """
        _require_same(dict(self.tensors), dict(now.tensors))
        names = [name for name, _ in self.tensors]
        both = list(zip(names, self.trained, now.trained, strict=True))
        frozen = [name for name, before, after in both if before and not after]
        thawed = [name for name, before, after in both if after and not before]
        if pending:
            name, what = (frozen or thawed)[0], "frozen" if frozen else "unfrozen"
            raise PlanError(
                f"parameter {name} was {what} in the middle of an accumulation; change requires_grad "
                "right after engine.step() at a boundary, or drop the gradients with engine.zero_grad() (the "
                "boundary stays where it was)"
            )
        said = []
        for what, changed in (("frozen", frozen), ("unfrozen", thawed)):
            if changed:
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                said.append(f"{changed[0]}{more} {'is' if not more else 'are'} {what}")
        return ", ".join(said)


def _require_same(before: dict[str, int], now: dict[str, int]) -> None:
    added = [name for name in now if name not in before]
    removed = [name for name in before if name not in now]
    replaced = [name for name in now if name in before and now[name] != before[name]]
    mend = "change the model before zerograph.compile, or destroy() the engine and compile it again"
    if added:
        raise PlanError(
            f"parameter {added[0]} was added to the model after it was compiled; {mend}"
        )
    if removed:
        raise PlanError(f"parameter {removed[0]} is gone from the compiled model; {mend}")
    if replaced:
        raise PlanError(
            f"parameter {replaced[0]} of the model is another tensor than when it was compiled; {mend}"
        )
