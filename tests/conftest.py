"""What every test may ask for; heavy things are made at their first use and once a worker."""

import signal
import sys
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = [
    "tests.support.postgres",
    "tests.support.provider",
    "tests.support.litellm",
    "tests.support.litellm_names",
    "tests.support.service",
    "tests.support.api",
]


# How fast examples are made says more about the machine than about a test.
settings.register_profile("tests", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("tests")

# Whoever starts the tests in the background has them ignore SIGINT, and every process that they
# start would inherit it; the command lines under test are ended with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Don't measure while tests are looked for: importing what they need takes half as long then.

    The plugins above have imported pricing and most of the service by now; whatever is left runs
    in processes of its own as well.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run `@pytest.mark.anyio` tests on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
