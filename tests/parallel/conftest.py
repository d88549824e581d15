"""The ranks that tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.parallel.ranks import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()
