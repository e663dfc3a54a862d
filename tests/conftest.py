"""How the suite runs: Hypothesis profiles (choose one with --hypothesis-profile) and one thread per worker."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("dev", max_examples=10, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=10, deadline=None, derandomize=True, database=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # an xdist worker: the cores belong to the workers, not to torch
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="session")
def text() -> str:
    """2,000 characters in which every tenth line breaks the rhythm, so that there is something to learn."""
    lines = ("the quick brown fox\n" if i % 10 else f"line {i} of many: {i * i}!\n" for i in range(200))
    return "".join(lines)[:2000]
