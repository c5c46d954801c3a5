"""A real LiteLLM a worker, its models routed to the fake provider."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proxy.embedded.litellm import LiteLLMChild
from tests.support.litellm_models import LIMITS, MODELS, PRICES, litellm_params
from tests.support.provider import FakeProvider

__all__ = ["LIMITS", "MODELS", "PRICES", "RunningLiteLLM", "litellm_section"]

MASTER_KEY = "sk-litellm-master"
# What the provider sees where nobody brings a key: the upstream credential.
PROVIDER_KEY = "provider-key-of-the-house"
# Set in the operator's environment as well, and never to be used by LiteLLM on its own account.
AMBIENT_KEY = "key-that-no-model-names"


class RunningLiteLLM(NamedTuple):
    """Where it is, and the key it wants."""

    url: str
    key: str
    child: LiteLLMChild


@pytest.fixture(scope="session")
def litellm(provider_server: FakeProvider) -> Iterator[RunningLiteLLM]:
    """LiteLLM with the models above, and `mock` and the guides' `demo`: it answers them itself."""
    directory = Path(tempfile.mkdtemp(prefix="tallygate-litellm-"))
    child = LiteLLMChild(
        litellm_section(provider_server.url),
        data_dir=directory,
        master_key=MASTER_KEY,
        environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY, "OPENAI_API_KEY": AMBIENT_KEY},
    )
    child.start()
    try:
        yield RunningLiteLLM(child.url, MASTER_KEY, child)
    finally:
        child.stop()
        shutil.rmtree(directory)


def litellm_section(provider_url: str) -> dict[str, Any]:
    """Return a `litellm:` section with every model, routed to the provider at that URL."""
    models: list[dict[str, Any]] = [
        {
            "model_name": name,
            "litellm_params": litellm_params(name, provider_url),
            "model_info": info,
        }
        for name, info in MODELS.items()
    ]
    mock = {"model": "openai/mock", "api_key": "none", "mock_response": "A mocked answer."}
    models += [
        {"model_name": name, "litellm_params": mock, "model_info": {**LIMITS, **PRICES}}
        for name in ("mock", "demo")
    ]
    # Its own retries would hide from a test what one failure does.
    return {"model_list": models, "router_settings": {"num_retries": 0}}
