"""Instruction sets by force: every kernel runs under each that the processor has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from winnow.kernels import backend

ISAS = backend.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.force_isa(request.param)
    yield request.param
    backend.force_isa(ISAS[0])
