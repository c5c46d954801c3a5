"""What every test may ask for; heavy things are made at their first use and once a worker."""

import signal
import sys
from collections.abc import Generator
from importlib import import_module
from pkgutil import walk_packages

import pytest
from hypothesis import HealthCheck, settings

import pricing
import proxy

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

    The service itself is imported before, for its lines to be counted.
    """
    tracer = sys.gettrace()
    if tracer is None:
        return (yield)
    for package in (pricing, proxy):
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != "proxy.embedded.tallygate_witness":  # it runs in LiteLLM's process
                import_module(module.name)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run `@pytest.mark.anyio` tests on the loop that the service runs on."""
    return "asyncio", {"use_uvloop": True}
