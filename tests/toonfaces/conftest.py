import pytest

import cfclip


@pytest.fixture(scope="session")
def toonfaces():
    """The committed networks; tests must not change them."""
    return cfclip.load_domain("toonfaces")
