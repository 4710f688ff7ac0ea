"""The errors that zerograph raises for its users.

Every message says what is wrong, where it is (a config key, a parameter name, a source line), and
how to mend it. Faults in zerograph itself are `AssertionError`, never one of these.
"""

import difflib
from collections.abc import Collection


class ZerographError(ValueError):
    """The root of all errors that a user of zerograph can mend."""


class ConfigError(ZerographError):
    """Raised when a config cannot be read, is wrong, or asks for what is not built."""


class CaptureError(ZerographError):
    """Raised when a model cannot be traced into one graph of a training step."""


class PlanError(ZerographError):
    """Raised when no rewritten graph can satisfy the config for this model and world size."""


class VerifyError(ZerographError):
    """Raised when a rewritten graph breaks a rule that every graph has to keep."""


class AgreementError(ZerographError):
    """Raised when ranks hold different plans, before any of them waits for another in vain."""


class CommunicationError(ZerographError, RuntimeError):
    """Raised when a collective fails or does not end in time: another rank died or stands still."""


class LossScaleError(ZerographError):
    """Raised when gradients overflow at the least loss scale, so that training cannot go on."""


class KernelError(ZerographError):
    """Raised when a generated kernel cannot be compiled."""


class KernelWarning(UserWarning):
    """Given when kernels run slower than they could, for want of a compiler or of Triton."""


class ProgramWarning(UserWarning):
    """Given when calls of an engine need many programs, or one for each shape."""


def suggestion(name: str, names: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest of `names`, else all of a few."""
    folded = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), folded, n=1)
    if near:
        return f"; did you mean {folded[near[0]]!r}?"
    return f"; there are {', '.join(names)}" if 0 < len(names) <= 20 else ""
