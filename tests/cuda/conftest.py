import pytest

from tests.cuda import stub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the driver that computes nothing is, and the cache of a module's processes on it."""
    path = tmp_path_factory.mktemp("driver")
    stub.build(path)
    return path
