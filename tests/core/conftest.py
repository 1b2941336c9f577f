"""The core reads no state of the device, so its tests prepare none and start in no time."""

import pytest


@pytest.fixture(autouse=True)
def state_home():
    pass
