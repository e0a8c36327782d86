"""Groups of processes that run all scenarios, started once."""

from __future__ import annotations

import pytest

from tests.distributed.findings import FEW, FINDINGS
from tests.distributed.scenarios import COMPARED, OTHERS
from tests.distributed.worlds import World


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory) -> World:
    """All scenarios on two processes."""
    names = [*COMPARED, *OTHERS, *FINDINGS]
    return World.started(2, names, tmp_path_factory.mktemp("two")).joined()


@pytest.fixture(scope="package")
def four(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Those on four that may come out otherwise there."""
    names = [*COMPARED, *OTHERS, *FEW]
    return World.started(4, names, tmp_path_factory.mktemp("four")).joined()


@pytest.fixture(params=["two", "four"])
def world(request: pytest.FixtureRequest) -> World:
    """Each of them."""
    found: World = request.getfixturevalue(request.param)
    return found
