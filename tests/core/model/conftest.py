"""`--models-table docs/models.md` writes what the parity tests found into that page."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models-table", type=Path, default=None, help="write the largest differences into this page; needs -n 0")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    page = session.config.getoption("--models-table", default=None)
    if page is not None and exitstatus == 0:
        from tests.core.model import table

        table.write(page)
