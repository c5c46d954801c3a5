"""What every test may ask for; heavy things are made at their first use and once a worker."""

import signal

import pytest

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.provider",
    "tests.support.litellm",
    "tests.support.service",
    "tests.support.api",
]


# Whoever starts the tests in the background has them ignore SIGINT, and every process that they
# start would inherit it; the command lines under test are ended with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run `@pytest.mark.anyio` tests on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
