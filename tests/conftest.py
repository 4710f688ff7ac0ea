"""Settings of the whole test run: one thread, no network, and the switch of the golden texts."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--accept-graphs",
        action="store_true",
        help="write the golden texts of tests/goldens from what the code makes now",
    )
