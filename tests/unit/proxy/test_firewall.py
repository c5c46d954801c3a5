"""What a hostile customer can put into a body, and what an innocent one does."""

import io
from importlib.util import find_spec
from typing import Any

import msgspec
import pytest

from proxy.endpoints import ENDPOINTS, Endpoint
from proxy.errors import InvalidRequestError
from proxy.firewall import (
    ALLOWED,
    CHAT,
    COMPLETIONS,
    DROPPED,
    EMBEDDINGS,
    IMAGE_EDITS,
    MESSAGES,
    RESPONSES,
    SOUND,
    Policy,
    check_body,
    check_form,
    upstream_headers,
)
from proxy.wire.form import Form, FormFile
from tests.support.litellm_names import Names


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


@pytest.mark.parametrize("tier", ["scale", "Auto", "ultrafast", 1, {}])
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


# What no endpoint's reference has, and may pass all the same where others' parameters do: it can
# change how many tokens an answer has, within its limit, and nothing else.
INNOCENT = set(
    """
    document documents error instruction instructions prompt_cache_options query reasoning
    reasoning_effort stream_options thinking tool_choice toolConfig tool_config top_k top_n_tokens
    temperature user voice
    """.split()  # noqa: SIM905 (a list to read)
)


@pytest.mark.skipif(find_spec("litellm") is None, reason="LiteLLM is not installed")
@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
def test_every_name_that_litellm_knows_is_decided_upon(
    endpoint: Endpoint, litellm_names: Names
) -> None:
    known = litellm_names
    assert len(known.settings) > 400
    assert len(known.in_code) > 200
    own = known.endpoints.get(endpoint.name, frozenset[str]())
    assert bool(own) == (endpoint.name != "audio.translations")
    undecided: list[str] = []
    names = known.settings | own | known.in_code
    for name in sorted(names - endpoint.policy.allowed - endpoint.policy.files - DROPPED):
        try:
            if endpoint.parse_form is None:
                check_body({name: msgspec.Raw(b'"x"')}, endpoint.policy)
            else:
                check_form(Form(texts=[(name, "x")]), endpoint.policy)
        except InvalidRequestError:
            continue
        undecided.append(name)
    assert set(undecided) <= INNOCENT
    assert endpoint.policy.is_open or not undecided


@pytest.mark.parametrize("endpoint", ENDPOINTS.values(), ids=lambda endpoint: endpoint.name)
def test_settings_of_litellm_are_refused_on_every_endpoint(endpoint: Endpoint) -> None:
    for name in HOSTILE:
        if name in endpoint.policy.allowed:
            continue  # a word of the reference here: `prompt` of a completion, `speed` of speech
        with pytest.raises(InvalidRequestError) as refused:
            check_body({name: msgspec.Raw(b'"x"')}, endpoint.policy)
        assert refused.value.param == name[:64]


@pytest.mark.parametrize(
    "name", ["n", "max_tokens", "max_completion_tokens", "messages", "modalities", "audio"]
)
@pytest.mark.parametrize("policy", [COMPLETIONS, RESPONSES, MESSAGES, EMBEDDINGS])
def test_what_bounds_the_cost_of_a_chat_is_not_smuggled_past_another_endpoints_bounds(
    policy: Policy, name: str
) -> None:
    if name in policy.allowed:
        return
    with pytest.raises(InvalidRequestError, match="no such parameter"):
        check_body({name: msgspec.Raw(b"10")}, policy)


@pytest.mark.parametrize("policy", [COMPLETIONS, EMBEDDINGS])
def test_tier_is_refused_where_nothing_reckons_with_it(policy: Policy) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_body({"service_tier": msgspec.Raw(b'"priority"')}, policy)
    assert refused.value.param == "service_tier"


def a_file(name: str) -> FormFile:
    return FormFile(name, "a.bin", "application/octet-stream", io.BytesIO(b"x"), 1)


def test_form_passes_what_its_reference_has() -> None:
    texts = [("model", "m"), ("include[]", "a"), ("include[]", "b"), ("metadata", "{}")]
    assert check_form(Form(texts, [a_file("file")]), SOUND) == texts[:3]
    files = [a_file(name) for name in ("image", "image[]", "mask")]
    assert check_form(Form([("prompt", "x")], files), IMAGE_EDITS) == [("prompt", "x")]


@pytest.mark.parametrize("name", ["model", "n", "metadata", "api_key", "litellm_metadata", "x", ""])
def test_file_is_refused_by_any_name_but_a_files(name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_form(Form([("model", "m")], [a_file("image"), a_file(name)]), IMAGE_EDITS)
    assert refused.value.param == name


@pytest.mark.parametrize("policy, name", [(IMAGE_EDITS, "image"), (SOUND, "file")])
def test_text_by_the_name_of_a_file_is_refused(policy: Policy, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="send it as a file") as refused:
        check_form(Form([(name, "https://example.com/a")]), policy)
    assert refused.value.param == name


ANTHROPIC_TOOLS: list[dict[str, Any]] = [
    {"type": "bash_20250124", "name": "bash"},
    {"type": "text_editor_20250728", "name": "edit", "max_characters": 100},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 1},
    {"type": "memory_20250818", "name": "memory"},
    {"name": "f", "input_schema": {}, "cache_control": {"type": "ephemeral"}},
]
SERVER_TOOLS: list[dict[str, Any]] = [
    {"type": "web_search_20250305", "name": "web_search"},
    {"type": "web_fetch_20250910", "name": "web_fetch"},
    {"type": "code_execution_20250825", "name": "code_execution"},
    {"type": "tool_search_tool_regex_20251119", "name": "search"},
    {"type": "mcp_toolset", "mcp_server_name": "x"},
    {"type": "bash_20250124", "name": "bash", "server_url": "http://x"},
    {"type": "bash_20250124x", "name": "bash"},
    {"type": "web_search"},
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "computer_use_preview", "environment": "linux"},
    {"type": "image_generation"},
    {"type": "mcp", "server_label": "x", "server_url": "http://x"},
    {"type": "local_shell"},
    {"name": "litellm_web_search", "input_schema": {}},
]


@pytest.mark.parametrize("tool", ANTHROPIC_TOOLS, ids=lambda tool: tool["name"])
def test_anthropics_tools_that_the_client_runs_pass(tool: dict[str, Any]) -> None:
    tools = msgspec.Raw(msgspec.json.encode([tool]))
    assert check_body({"tools": tools}, MESSAGES) == {"tools": tools}


@pytest.mark.parametrize("tool", SERVER_TOOLS, ids=lambda tool: tool.get("type", tool.get("name")))
@pytest.mark.parametrize("policy", [CHAT, RESPONSES, MESSAGES])
def test_tools_that_cost_more_than_tokens_are_refused(policy: Policy, tool: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        check_body({"tools": msgspec.Raw(msgspec.json.encode([tool]))}, policy)
    assert refused.value.param == "tools"


@pytest.mark.parametrize(
    "sent, passed",
    [
        ("interleaved-thinking-2025-05-14", "interleaved-thinking-2025-05-14"),
        ("context-1m-2025-08-07,files-api-2025-04-14", "context-1m-2025-08-07"),
        ("effort-2025-11-24 , claude-code-20250219", "effort-2025-11-24,claude-code-20250219"),
        ("files-api-2025-04-14", None),
        ("code-execution-2025-08-25", None),
        ("mcp-client-2025-04-04", None),
        ("web-fetch-2025-09-10", None),
        ("skills-2025-10-02", None),
        ("effort-2025-11-24\r\nx-evil: 1", "effort-2025-11-24"),
        ("xeffort-2025-11-24", None),
        ("effort-2025-11-24x", None),
        ("", None),
    ],
)
def test_only_betas_that_change_no_price_pass(sent: str, passed: str | None) -> None:
    headers = upstream_headers("id", "account", "sk-master", sent)
    assert headers.get("anthropic-beta") == passed


def test_upstream_gets_our_headers_only() -> None:
    headers = upstream_headers("0199-id", "an-account", "sk-master", "nonsense-2026-01-01")
    assert headers["authorization"] == "Bearer sk-master"
    assert headers["x-litellm-call-id"] == "0199-id"
    assert headers["x-tallygate-account"] == "an-account"
    assert "anthropic-beta" not in headers
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
