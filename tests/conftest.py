"""What every test may ask for; heavy things are made at their first use and once a worker."""

import pytest

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.provider",
    "tests.support.litellm",
    "tests.support.service",
    "tests.support.api",
]


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run `@pytest.mark.anyio` tests on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
