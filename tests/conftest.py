"""Settings of the whole test run: one thread, no network, and zerograph's own pytest plugin."""

import logging
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["ZEROGRAPH_LAUNCH"] = ""  # launch settings as the package has them

import pytest
import torch

from tests.kernels import Targets
from zerograph import pytest_plugin

torch.set_num_threads(1)


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """The plugin's entry point is missing where the package was installed before it had one."""
    if not pluginmanager.is_registered(pytest_plugin):
        pluginmanager.register(pytest_plugin, "zerograph")


@pytest.fixture
def torchs_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels in torch operations, for tests that compare training with torch.optim bit for bit.

    torch's square root on the CPU is not correctly rounded, so no other target can have its bits.
    test_kernel_torch.py compares the other targets with torch.optim.
    """
    monkeypatch.setenv("ZEROGRAPH_KERNELS", "torch")


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the logger "zerograph" says from here on. pytest's own caplog sees none of it: torch's logging
    has it propagate nothing."""
    messages, logger = _Messages(), logging.getLogger("zerograph")
    logger.addHandler(messages)
    yield messages.found
    logger.removeHandler(messages)


@pytest.fixture(scope="session")
def call() -> Iterator[Targets]:
    """Calls a generated kernel on a target by name; Triton's interpreter is started at its first call."""
    made = Targets()
    yield made
    made.close()
