"""What LiteLLM would take from a hostile body or header: by name, on every endpoint.

After each attack price, route, credentials and another customer's service are what they were.
"""

from typing import Any

import httpx
import pytest

from tests.e2e.surface import EVIL, Surface, surface
from tests.support.calls import CALLS, JSON_CALLS
from tests.support.litellm import RunningLiteLLM

__all__ = ["surface"]

# Refused everywhere, with a 400 that names it.
REFUSED: dict[str, Any] = {
    # Another price.
    "input_cost_per_token": 0,
    "output_cost_per_token": 0,
    "input_cost_per_second": 0,
    "output_cost_per_second": 0,
    "input_cost_per_character": 0,
    "input_cost_per_image": 0,
    "output_cost_per_image": 0,
    "input_cost_per_query": 0,
    "model_info": {"input_cost_per_token": 0},
    "mock_response": "free",
    "mock_tool_calls": [],
    "mock_timeout": True,
    "mock_testing_fallbacks": True,
    "mock_testing_rate_limit_error": True,
    "base_model": "free",
    "response_cost": 0,
    "cache": {"ttl": 600, "namespace": "x"},
    "caching": True,
    "ttl": 600,
    # Another route.
    "custom_llm_provider": "anthropic",
    "fallbacks": ["dear"],
    "context_window_fallbacks": [{"priced": ["dear"]}],
    "content_policy_fallbacks": [{"priced": ["dear"]}],
    "disable_fallbacks": False,
    "models": ["dear"],
    "deployment_id": "x",
    "specific_deployment": True,
    "user_config": {"model_list": []},
    "router_settings_override": {"fallbacks": [{"priced": ["dear"]}]},
    "api_base": f"http://{EVIL}.invalid",
    "base_url": f"http://{EVIL}.invalid",
    "api_version": "x",
    "api_type": "azure",
    "region_name": "x",
    "litellm_params": {"api_base": f"http://{EVIL}.invalid"},
    "extra_body": {"model": "dear"},
    "extra_query": {"key": EVIL},
    "Model": "dear",
    "API_BASE": f"http://{EVIL}.invalid",
    "apiBase": f"http://{EVIL}.invalid",
    # Other credentials.
    "api_key": EVIL,
    "extra_headers": {"Authorization": f"Bearer {EVIL}"},
    "headers": {"Authorization": f"Bearer {EVIL}"},
    "default_headers": {"x-api-key": EVIL},
    "provider_specific_header": {"custom_llm_provider": "openai", "extra_headers": {"a": EVIL}},
    "organization": EVIL,
    "litellm_credential_name": "x",
    "configurable_clientside_auth_params": ["api_base"],
    "aws_access_key_id": EVIL,
    "aws_role_name": EVIL,
    "vertex_credentials": EVIL,
    "azure_ad_token": EVIL,
    "user_api_key": EVIL,
    "user_api_key_dict": {},
    "proxy_server_request": {},
    "secret_fields": {"raw_headers": {}},
    # Other customers' service.
    "num_retries": 50,
    "max_retries": 50,
    "retry_policy": {},
    "timeout": 0.001,
    "request_timeout": 0.001,
    "stream_timeout": 0.001,
    "cooldown_time": 600,
    "allowed_fails": 0,
    "priority": 0,
    "rpm": 0,
    "max_parallel_requests": 1,
    # Records, and what watches over a call.
    "no-log": True,
    "no_log": True,
    "turn_off_message_logging": True,
    "guardrails": [],
    "disable_global_guardrails": True,
    "callbacks": ["x"],
    "success_callback": ["langfuse"],
    "langfuse_host": f"http://{EVIL}.invalid",
    "s3_bucket_name": EVIL,
    "logger_fn": "x",
    "has_logged_async_success": True,
    "completion_start_time": 0,
    "litellm_trace": "x",
    "drop_params": True,
    "allowed_openai_params": ["x"],
    "metadata[tags]": "x",
    "litellm_metadata[tags]": "x",
    "x-litellm-tags": "x",
    "self": "x",
}
# Labels for records: left out, and the call goes its way.
DROPPED: dict[str, Any] = {
    "metadata": {"model_info": {"input_cost_per_token": 0}, "tags": ["x"], "model_group": "free"},
    "litellm_metadata": {"model_info": {"input_cost_per_token": 0}},
    "tags": ["paid"],
    "litellm_call_id": "0199-mine",
    "litellm_trace_id": "x",
    "session_id": "x",
}
HEADERS = {
    "x-litellm-call-id": EVIL,
    "x-litellm-timeout": "0.001",
    "x-litellm-stream-timeout": "0.001",
    "x-litellm-num-retries": "50",
    "x-litellm-tags": EVIL,
    "x-litellm-api-key": EVIL,
    "x-litellm-model": "dear",
    "x-litellm-enable-message-redaction": "true",
    "x-litellm-spend-logs-metadata": "{}",
    "x-litellm-customer-id": EVIL,
    "x-litellm-response-cost": "0",
    "litellm-metadata": EVIL,
    "llm_provider-authorization": EVIL,
    "llm_provider-x-api-key": EVIL,
    "x-pass-authorization": EVIL,
    "x-mcp-auth": EVIL,
    "x-tallygate-account": EVIL,
    "api-key": EVIL,
    "x-goog-api-key": EVIL,
    "ocp-apim-subscription-key": EVIL,
    "openai-organization": EVIL,
    "openai-project": EVIL,
    "langfuse_public_key": EVIL,
    "cookie": f"token={EVIL}",
    "x-forwarded-for": EVIL,
    "x-http-method-override": "DELETE",
    "traceparent": f"00-{'0' * 31}1-{'0' * 15}1-01",
}


@pytest.mark.parametrize("name", REFUSED)
def test_setting_is_refused_by_name_on_every_endpoint(surface: Surface, name: str) -> None:
    for call in CALLS.values():
        answer = surface.attack(call, {name: REFUSED[name]})
        assert answer.status_code == 400, (call.path, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    surface.assert_bystander_served(CALLS["/v1/chat/completions"])


@pytest.mark.parametrize("value", ["", None, " ", "\t", [], {}])
def test_blank_key_in_the_body_is_refused_on_every_endpoint(surface: Surface, value: Any) -> None:
    for call in CALLS.values():
        answer = surface.attack(call, {"api_key": value})
        surface.assert_refused(call, answer, param="api_key")


@pytest.mark.parametrize("name", DROPPED)
def test_label_is_dropped_on_every_endpoint(surface: Surface, name: str) -> None:
    for call in CALLS.values():
        surface.begin(call)
        answer = call.send(surface.client, surface.attacker.customer.key, {name: DROPPED[name]})
        assert answer.status_code == 200, (call.path, answer.text)
        assert name not in surface.provider.last().asked()
        surface.assert_harmless(call, answer)


@pytest.mark.parametrize("name", HEADERS)
def test_header_of_the_customers_goes_nowhere(surface: Surface, name: str) -> None:
    answer = surface.attack(CALLS["/v1/chat/completions"], headers={name: HEADERS[name]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", CALLS)
def test_headers_of_the_customers_go_nowhere_on_any_endpoint(surface: Surface, path: str) -> None:
    answer = surface.attack(CALLS[path], headers=HEADERS)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "model, status",
    [
        ("priced,dear", 400),
        ("", 400),
        (" ", 404),
        ("priced ", 404),
        ("PRICED", 404),
        ("openai/priced", 404),
        ("priced\n", 404),
        ("*", 404),
        ("pric\u0435d", 404),
    ],
)
def test_name_that_is_not_quite_a_models_is_no_way_to_one(
    surface: Surface, model: str, status: int
) -> None:
    for call in CALLS.values():
        answer = surface.attack(call, {"model": model})
        surface.assert_refused(call, answer, status, "model")


@pytest.mark.parametrize("model", [["priced", "dear"], {"priced": 1}, 1, True])
def test_model_of_a_wrong_kind_is_refused(surface: Surface, model: Any) -> None:
    for call in JSON_CALLS.values():
        answer = surface.attack(call, {"model": model})
        surface.assert_refused(call, answer, 400, "model")


def test_deployment_is_not_called_by_its_id(surface: Surface, litellm: RunningLiteLLM) -> None:
    info = httpx.get(
        f"{litellm.url}/model/info", headers={"authorization": f"Bearer {litellm.key}"}
    ).json()["data"]
    ids = {deployment["model_name"]: deployment["model_info"]["id"] for deployment in info}
    for call in CALLS.values():
        answer = surface.attack(call, {"model": ids[call.model]})
        surface.assert_refused(call, answer, 404, "model")


@pytest.mark.parametrize("path", JSON_CALLS)
def test_duplicate_names_reach_the_provider_once(surface: Surface, path: str) -> None:
    call = JSON_CALLS[path]
    surface.begin(call)
    plain = httpx.Request("POST", "http://x", json=dict(call.body)).content
    body = b'{"model":"dear","model":"free","api_b\\u0061se":null,' + plain[1:]
    headers = {"authorization": f"Bearer {surface.attacker.customer.key}"}
    refused = surface.client.post(path, content=body, headers=headers)
    assert refused.json()["error"]["param"] == "api_base"  # however it is spelled
    twice = body.replace(b'"api_b\\u0061se":null,', b"")
    answer = surface.client.post(path, content=twice, headers=headers)
    assert answer.status_code == 200, answer.text
    assert surface.provider.last().body.count(b'"model"') == 1
    surface.assert_harmless(call, answer)


# What LiteLLM has besides the endpoints that are metered here, and ways round a path.
ELSEWHERE = [
    "/v1//chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions/x",
    "/v1/Chat/Completions",
    "/v1/chat%2fcompletions/x",
    "/v1/models/../chat/completions/x",
    "/v1/responses/compact",
    "/v1/responses/input_tokens",
    "/v1/messages/batches",
    "/v1/files",
    "/v1/batches",
    "/v1/fine_tuning/jobs",
    "/v1/vector_stores",
    "/v1/assistants",
    "/v1/threads",
    "/v1/images/variations",
    "/v1/realtime",
    "/v1/rag/ingest",
    "/v1/containers",
    "/v1/ocr",
    "/v1/videos",
    "/v1/mcp/tools",
    "/v1/model/info",
    "/v1/key/generate",
    "/v2/rerank",
    "/engines/priced/chat/completions",
    "/openai/deployments/priced/chat/completions",
    "/anthropic/v1/messages",
    "/openai_passthrough/chat/completions",
    "/vertex_ai/x",
    "/key/generate",
    "/model/new",
    "/config/update",
    "/utils/token_counter",
    "/spend/calculate",
    "/cache/ping",
]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_nothing_of_litellms_is_reached_but_what_is_metered(surface: Surface, method: str) -> None:
    call = CALLS["/v1/chat/completions"]
    surface.begin(call)
    headers = {"authorization": f"Bearer {surface.attacker.customer.key}"}
    for path in ELSEWHERE:
        answer = surface.client.request(method, path, json=dict(call.body), headers=headers)
        assert answer.status_code in {404, 405}, (path, answer.text)
        assert "litellm" not in answer.text.lower(), path
        assert not surface.provider.requests, path
    surface.assert_bystander_served(call)
