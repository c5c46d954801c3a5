"""What a hostile customer can put into a body, and what an innocent one does."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest

from proxy.errors import InvalidRequestError
from proxy.firewall import (
    ALLOWED,
    DROPPED,
    check_body,
    upstream_headers,
)


def check(**members: object) -> dict[str, Any]:
    fields = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in members.items()}
    return {name: msgspec.json.decode(raw) for name, raw in check_body(fields).items()}


# Every parameter of OpenAI's reference of chat completions that costs tokens only.
OPENAI: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Hi"}],
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": "auto",
    "functions": [{"name": "f", "description": "d", "parameters": {"type": "object"}}],
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 10,
    "max_tokens": 10,
    "modalities": ["text", "audio"],
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": 0.5,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
    "safety_identifier": "s",
    "seed": 1,
    "service_tier": "auto",
    "stop": ["\n"],
    "store": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.1,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}],
    "top_logprobs": 2,
    "top_p": 0.9,
    "user": "u",
    "verbosity": "low",
}

# What other providers have that LiteLLM passes on.
PROVIDERS: dict[str, Any] = {
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "top_k": 5,
    "topK": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "safe_prompt": True,
    "random_seed": 3,
    "safety_settings": [{"category": "x", "threshold": "y"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "enable_thinking": True,
    "thinking_budget": 100,
    "guided_json": {"type": "object"},
    "include_reasoning": True,
    "reasoning": {"effort": "high"},
    "reasoning_format": "parsed",
    "ignore_eos": False,
    "skip_special_tokens": False,
    "min_tokens": 1,
    "documents": [{"text": "x"}],
}


def test_openais_parameters_pass_unchanged() -> None:
    assert check(**OPENAI) == OPENAI
    assert {*OPENAI, "thinking"} == ALLOWED


def test_parameters_of_other_providers_pass_unchanged() -> None:
    assert check(**PROVIDERS) == PROVIDERS


def test_labels_for_records_are_dropped() -> None:
    assert check(model="demo", **dict.fromkeys(DROPPED, "x")) == {"model": "demo"}
    assert check(metadata={"tags": ["x"], "user_api_key": "y"}) == {}


HOSTILE = """
    api_key api_base base_url api_version organization deployment_id custom_llm_provider model_list
    model_info user_config litellm_params litellm_credential_name fallbacks context_window_fallbacks
    content_policy_fallbacks num_retries max_retries retry_policy timeout request_timeout
    stream_timeout cooldown_time cache caching ttl s3_bucket_name extra_headers headers
    default_headers extra_body extra_query provider_specific_header no-log no_log mock_response
    mock_timeout mock_tool_calls mock_testing_fallbacks input_cost_per_token
    output_cost_per_token cost_per_second response_cost guardrails disable_global_guardrails
    prompt_id prompt_variables proxy_server_request secret_fields specific_deployment
    langfuse_public_key langfuse_host langsmith_api_key callbacks success_callback logger_fn
    user_api_key user_api_key_metadata router_settings_override routing_strategy vector_store_ids
    aws_access_key_id aws_region_name vertex_credentials azure_ad_token google_api_key priority
    drop_params additional_drop_params allowed_openai_params model_config silent_model
    self kwargs original_function prompt spend_logs_metadata ssl_verify shared_session
    models route provider plugins web_search_options search_parameters mcp_servers container
    cached_content previous_response_id conversation speed best_of max_output_tokens
    maxOutputTokens maxTokens MAX_TOKENS Api_Key apiKey API_BASE ApiBase candidateCount
    generationConfig additionalModelRequestFields anthropic_beta inference_geo chat_template
    _litellm_internal metadata[tags] METADATA litellm_anything x-litellm-tags
""".split()  # noqa: SIM905 (a list to read)


@pytest.mark.parametrize("name", [*HOSTILE, "", "a b", "é", "a" * 65, "a\n"])
@pytest.mark.parametrize("value", [None, "x"])
def test_settings_of_litellm_are_refused_by_name(name: str, value: object) -> None:
    if name == "web_search_options" and value is None:
        return
    with pytest.raises(InvalidRequestError) as refused:
        check(**{name: value})
    assert refused.value.code == "unsupported_parameter"
    assert refused.value.param == name[:64]
    assert repr(name[:64]) in refused.value.message


def test_null_search_is_no_search() -> None:
    assert check(web_search_options=None) == {}


@pytest.mark.parametrize("tier", [None, "auto", "default"])
def test_usual_tier_passes(tier: str | None) -> None:
    assert check(service_tier=tier) == {"service_tier": tier}


@pytest.mark.parametrize("tier", ["priority", "flex", "scale", "Auto", 1, {}])
def test_tier_at_another_price_is_refused(tier: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check(service_tier=tier)
    assert refused.value.param == "service_tier"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f"}, "cache_control": {"type": "ephemeral"}},
        {"function": {"name": "f"}},
        {"type": "function", "name": "f", "parameters": {}},
        {"type": "custom", "custom": {"name": "f", "format": {}}},
        {"name": "f", "input_schema": {}},
    ],
)
def test_tools_that_the_client_runs_pass(tool: dict[str, Any]) -> None:
    assert check(tools=[tool]) == {"tools": [tool]}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "mcp", "server_url": "litellm_proxy", "require_approval": "never"},
        {"type": "function", "server_url": "litellm_proxy"},
        {"type": "function", "googleSearch": {}},
        {"googleSearch": {}},
        {"type": "web_search_preview"},
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "file_search", "vector_store_ids": ["vs_1"]},
        {"type": "code_interpreter", "container": {}},
        {"type": ["function"]},
        {"type": "function", "function": {"name": "litellm_web_search"}},
        {"type": "custom", "custom": {"name": "LiteLLM_x"}},
        {"name": "litellm_code_execution", "input_schema": {}},
    ],
)
@pytest.mark.parametrize("param", ["tools", "functions"])
def test_tools_that_others_run_are_refused(param: str, tool: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check(**{param: [tool]})
    assert refused.value.param == param
    assert refused.value.code == "unsupported_parameter"


@pytest.mark.parametrize("tools", [{}, "x", [1], [[]]])
def test_tools_of_a_wrong_kind_are_refused(tools: object) -> None:
    with pytest.raises(InvalidRequestError, match="must be a list of objects"):
        check(tools=tools)


def test_no_tools_are_no_tools() -> None:
    assert check(tools=None, functions=[]) == {"tools": None, "functions": []}


_LITELLMS_OWN_NAMES = """
import inspect, json, litellm
from litellm.litellm_core_utils import initialize_dynamic_callback_params as callbacks
from litellm.proxy import litellm_pre_call_utils, route_llm_request
from litellm.proxy.auth import auth_utils
from litellm.types import router, utils

names = {
    *utils.all_litellm_params,
    *utils.CustomPricingLiteLLMParams.model_fields,
    *router.LiteLLM_Params.model_fields,
    *auth_utils._BANNED_REQUEST_BODY_PARAMS,
    *litellm_pre_call_utils._UNTRUSTED_ROOT_CONTROL_FIELDS,
    *litellm_pre_call_utils._UNTRUSTED_METADATA_CONTROL_FIELDS,
    *route_llm_request.GATED_MOCK_PARAM_NAMES,
    *callbacks._supported_callback_params,
    *callbacks._request_blocked_callback_params,
}
for function in (
    litellm.completion,
    litellm.acompletion,
    litellm.Router.acompletion,
    litellm.Router._acompletion,
    litellm.Router.async_function_with_fallbacks,
    litellm.Router.async_function_with_retries,
):
    names |= set(inspect.signature(function).parameters)
print(json.dumps(sorted(names)))
"""


@pytest.mark.skipif(find_spec("litellm") is None, reason="LiteLLM is not installed")
def test_every_name_that_litellm_knows_is_decided_upon() -> None:
    printed = subprocess.run(  # another process: importing LiteLLM takes seconds and 173 MB
        [sys.executable, "-c", _LITELLMS_OWN_NAMES],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"},
        check=True,
        capture_output=True,
    ).stdout
    names = set(msgspec.json.decode(printed.splitlines()[-1], type=list[str]))
    assert len(names) > 400
    undecided: list[str] = []
    for name in sorted(names - ALLOWED - DROPPED):
        try:
            check_body({name: msgspec.Raw(b'"x"')})
        except InvalidRequestError:
            continue
        undecided.append(name)
    assert undecided == []


def test_upstream_gets_our_headers_only() -> None:
    headers = upstream_headers("0199-id", "sk-master")
    assert headers["authorization"] == "Bearer sk-master"
    assert headers["x-litellm-call-id"] == "0199-id"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
