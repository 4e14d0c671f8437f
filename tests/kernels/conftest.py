"""Instruction sets by force: every kernel runs under each that the processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.many_queries import ISAS, forced


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param
