"""Groups of processes that run all scenarios, started once."""

from __future__ import annotations

import pytest

from tests.distributed.findings import FINDINGS
from tests.distributed.scenarios import COMPARED, OTHERS
from tests.distributed.worlds import World


@pytest.fixture(scope="package", params=[2, 4], ids=["two", "four"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """All scenarios on two and on four processes."""
    return World.started(
        request.param, [*COMPARED, *OTHERS, *FINDINGS], tmp_path_factory.mktemp("world")
    ).joined()
