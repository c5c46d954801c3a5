"""The names that LiteLLM knows in a request's body, read from the LiteLLM that is installed.

It is asked in a process of its own: importing it takes seconds and 173 MB. Nor is it measured.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from tests.support.once import once

_SCRIPT = r"""
import inspect, json, re
from pathlib import Path
import litellm
from litellm.litellm_core_utils import initialize_dynamic_callback_params as callbacks
from litellm.proxy import litellm_pre_call_utils, route_llm_request
from litellm.proxy.auth import auth_utils
from litellm.types import rerank, router, utils
from litellm.types.images import main as images
from litellm.types.llms import anthropic, openai

settings = {
    *utils.all_litellm_params,
    *utils.CustomPricingLiteLLMParams.model_fields,
    *router.LiteLLM_Params.model_fields,
    *auth_utils._BANNED_REQUEST_BODY_PARAMS,
    *litellm_pre_call_utils._UNTRUSTED_ROOT_CONTROL_FIELDS,
    *litellm_pre_call_utils._UNTRUSTED_METADATA_CONTROL_FIELDS,
    *route_llm_request.GATED_MOCK_PARAM_NAMES,
    *callbacks._supported_callback_params,
    *callbacks._request_blocked_callback_params,
    *router.UpdateRouterConfig.model_fields,
    *inspect.signature(litellm.Router.__init__).parameters,
    *inspect.signature(litellm.Router.async_function_with_fallbacks).parameters,
    *inspect.signature(litellm.Router.async_function_with_retries).parameters,
}
functions = {
    "chat.completions": ("completion", "acompletion", "_acompletion"),
    "completions": ("text_completion", "atext_completion"),
    "responses": ("responses", "aresponses"),
    "messages": ("anthropic_messages", "aanthropic_messages"),
    "embeddings": ("embedding", "aembedding", "_aembedding"),
    "moderations": ("moderation", "amoderation"),
    "rerank": ("rerank", "arerank", "_arerank"),
    "images.generations": ("image_generation", "aimage_generation", "_aimage_generation"),
    "images.edits": ("image_edit", "aimage_edit"),
    "audio.speech": ("speech", "aspeech"),
    "audio.transcriptions": ("transcription", "atranscription", "_atranscription"),
}
references = {
    "responses": openai.ResponsesAPIOptionalRequestParams,
    "messages": anthropic.AnthropicMessagesRequest,
    "rerank": rerank.OptionalRerankParams,
    "images.edits": images.ImageEditOptionalRequestParams,
}
endpoints = {}
for endpoint, names in functions.items():
    known = set(getattr(references.get(endpoint), "__annotations__", ()))
    for name in names:
        for owner in (litellm, litellm.Router):
            if inspect.isfunction(function := getattr(owner, name, None)):
                known |= set(inspect.signature(function).parameters)
    endpoints[endpoint] = sorted(known)

# What the code that every request goes through reads from it without declaring it anywhere.
root = Path(litellm.__file__).parent
read = re.compile(
    r"\b(?:kwargs|data|(?:request|initial|input)_(?:data|kwargs)|model_call_details)"
    r"(?:\.(?:get|pop|setdefault)\(\s*|\[)[\"']([A-Za-z_][\w-]*)[\"']"
)
modules = ["main.py", "utils.py", "router.py", "images/main.py", "responses/main.py",
    "rerank_api/main.py", "proxy/litellm_pre_call_utils.py", "proxy/common_request_processing.py",
    "proxy/route_llm_request.py", "proxy/auth/auth_utils.py"]
sources = [root / name for name in modules]
for folder in ("litellm_core_utils", "router_utils", "router_strategy", "proxy/hooks"):
    sources += (root / folder).rglob("*.py")
in_code = {name for source in sources for name in read.findall(source.read_text())}

print(json.dumps([sorted(settings), endpoints, sorted(in_code)]))
"""


class Names(NamedTuple):
    """Names of body members.

    `settings` are LiteLLM's own on any endpoint, `endpoints` the arguments of the functions behind
    each, `in_code` what its code reads from a request, or from what it notes of one.
    """

    settings: frozenset[str]
    endpoints: dict[str, frozenset[str]]
    in_code: frozenset[str]


@pytest.fixture(scope="session")
def litellm_names(tmp_path_factory: pytest.TempPathFactory) -> Names:
    """What the installed LiteLLM knows; it is asked once a run."""
    answer = once(tmp_path_factory, "litellm-names.json", _ask).read_bytes()
    return msgspec.json.decode(answer, type=Names)


def _ask(path: Path) -> None:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("COVERAGE_")}
    printed = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
        check=True,
        capture_output=True,
    ).stdout
    path.write_bytes(printed.splitlines()[-1])
