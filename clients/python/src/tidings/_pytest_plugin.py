"""The fixture that pytest finds wherever this package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import Published


@pytest.fixture
def tidings_events() -> Iterator[Published]:
    """What the test publishes to Tidings, which goes nowhere else."""
    from .testing import capture

    with capture() as published:
        yield published
