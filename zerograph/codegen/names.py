"""From a kernel's name back to what it is, so that a saved plan can be compiled without its model.

spec_of("update_adamw_amsgrad_bf16_f32_bf16")   Update("adamw", {"amsgrad"}, bf16, fp32, bf16)
spec_of("finish_clip_f32_skip")                 Finish(True, fp32, True)
"""

from typing import Literal, cast

from zerograph.codegen.rules import RULES
from zerograph.codegen.spec import SHORT, Copy, Finish, Norm, Phase, Spec, Update
from zerograph.errors import KernelError

_DTYPES = {name: dtype for dtype, name in SHORT.items()}
_PHASES: dict[str, Phase] = {"update": "whole", "measure": "measure", "apply": "apply"}


def spec_of(name: str) -> Spec:
    """The spec whose `name` it is. Raises KernelError for one of another zerograph."""
    try:
        found = _read(*name.split("_"))
    except (KeyError, IndexError, TypeError, ValueError):
        found = None
    if found is None or found.name != name:
        raise KernelError(
            f"no kernel {name!r} is known here: the plan is of another version of zerograph, or was "
            "changed; plan again"
        )
    return found


def _read(kind: str, *words: str) -> Spec | None:
    """Only for a kernel's own name is it right; `spec_of` compares."""
    dtypes = [_DTYPES[word] for word in words if word in _DTYPES]
    if kind in _PHASES:
        flags = frozenset(word for word in words[1:] if word not in _DTYPES) - {"free"}
        grad, master, *low = dtypes
        if not flags <= set(RULES[words[0]].defaults):
            return None
        last, free = low[0] if low else None, "free" not in words
        return Update(words[0], flags, grad, master, last, free, _PHASES[kind])
    if kind == "norm":
        return Norm(*dtypes)
    if kind == "finish":
        return Finish("clip" in words, dtypes[0] if dtypes else None, "skip" in words)
    if kind in ("pack", "unpack"):
        return Copy(cast(Literal["pack", "unpack"], kind), *dtypes)
    return None
