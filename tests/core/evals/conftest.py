"""The tiny model, written once."""

from pathlib import Path

import pytest

from tests.core.evals.tiny import write_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in a folder."""
    return write_model(tmp_path_factory.mktemp("model"))
