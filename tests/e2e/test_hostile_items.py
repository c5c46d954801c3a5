"""What Anthropic and OpenAI would do beyond answering, and what is kept under their accounts.

Tools that they run, containers, files, stored answers: paid apart from tokens, or another
customer's.
"""

from typing import Any

import httpx
import pytest

from tests.e2e.surface import Surface, surface
from tests.support.calls import CALLS
from tests.support.provider import Reply

__all__ = ["surface"]

RESPONSES = CALLS["/v1/responses"]
MESSAGES = CALLS["/v1/messages"]
CHAT = CALLS["/v1/chat/completions"]

TOOLS: dict[str, dict[str, Any]] = {
    "web_search": {"type": "web_search"},
    "web_search_preview": {"type": "web_search_preview", "search_context_size": "high"},
    "file_search": {"type": "file_search", "vector_store_ids": ["vs_1"]},
    "code_interpreter": {"type": "code_interpreter", "container": {"type": "auto"}},
    "computer_use": {"type": "computer_use_preview", "display_width": 1, "display_height": 1},
    "image_generation": {"type": "image_generation"},
    "mcp": {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:1"},
    "mcp of LiteLLM": {"type": "mcp", "server_label": "x", "server_url": "litellm_proxy"},
    "web_search_20250305": {"type": "web_search_20250305", "name": "web_search", "max_uses": 9},
    "web_fetch_20250910": {"type": "web_fetch_20250910", "name": "web_fetch"},
    "code_execution_20250825": {"type": "code_execution_20250825", "name": "code_execution"},
    "mcp_toolset": {"type": "mcp_toolset", "mcp_server_name": "x"},
    "googleSearch": {"googleSearch": {}},
    "litellm_web_search": {"type": "function", "name": "litellm_web_search", "parameters": {}},
}


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_that_the_provider_runs_is_refused(surface: Surface, tool: str) -> None:
    for call in (RESPONSES, MESSAGES, CHAT):
        answer = surface.attack(call, {"tools": [TOOLS[tool]]})
        surface.assert_refused(call, answer, param="tools")
    surface.assert_bystander_served(RESPONSES)


STATE: dict[str, Any] = {
    "background": True,
    "conversation": "conv_1",
    "prompt": {"id": "pmpt_1"},
    "context_management": [{"type": "compaction"}],
    "container": "cntr_1",
    "mcp_servers": [{"type": "url", "url": "http://127.0.0.1:1", "name": "x"}],
    "vector_store_ids": ["vs_1"],
    "betas": ["files-api-2025-04-14"],
    "anthropic_beta": ["code-execution-2025-08-25"],
    "speed": "fast",
    "inference_geo": "us",
}


@pytest.mark.parametrize("name", STATE)
def test_what_outlives_or_outgrows_the_answer_is_refused(surface: Surface, name: str) -> None:
    for call in (RESPONSES, MESSAGES):
        answer = surface.attack(call, {name: STATE[name]})
        surface.assert_refused(call, answer, param=name)
    surface.assert_bystander_served(RESPONSES)


ITEMS: dict[str, dict[str, Any]] = {
    "item_reference": {"type": "item_reference", "id": "msg_1"},
    "only an id": {"id": "msg_1"},
    "null for a type": {"type": None, "id": "msg_1"},
    "image_generation_call": {"type": "image_generation_call", "id": "ig_1"},
    "file_id of a picture": {
        "role": "user",
        "content": [{"type": "input_image", "file_id": "file-1"}],
    },
    "file_id of a file": {
        "role": "user",
        "content": [{"type": "input_file", "file_id": "file-1"}],
    },
    "file_id of a screenshot": {
        "type": "computer_call_output",
        "call_id": "c",
        "output": {"type": "computer_screenshot", "file_id": "file-1"},
    },
    "file_id in a tool's output": {
        "type": "function_call_output",
        "call_id": "c",
        "output": [{"type": "input_file", "file_id": "file-1"}],
    },
    "file of the operator's cloud": {
        "role": "user",
        "content": [{"type": "input_file", "file_url": "gs://private/a.pdf"}],
    },
}


@pytest.mark.parametrize("item", ITEMS)
def test_item_of_the_operators_account_is_refused(surface: Surface, item: str) -> None:
    answer = surface.attack(RESPONSES, {"input": [ITEMS[item]]})
    surface.assert_refused(RESPONSES, answer, param="input")


BLOCKS: dict[str, dict[str, Any]] = {
    "container_upload": {"type": "container_upload", "file_id": "file_1"},
    "file_id of a picture": {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
    "file_id of a document": {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
    "file_id in a tool's result": {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "image", "source": {"type": "file", "file_id": "file_1"}}],
    },
    "file_id in a document": {
        "type": "document",
        "source": {
            "type": "content",
            "content": [{"type": "image", "source": {"type": "file", "file_id": "file_1"}}],
        },
    },
    "file of the operator's cloud": {
        "type": "image",
        "source": {"type": "url", "url": "s3://private/a.png"},
    },
    "file of the machine": {
        "type": "document",
        "source": {"type": "url", "url": "file:///etc/passwd"},
    },
}


@pytest.mark.parametrize("block", BLOCKS)
def test_block_of_the_operators_account_is_refused(surface: Surface, block: str) -> None:
    messages = [{"role": "user", "content": [BLOCKS[block]]}]
    answer = surface.attack(MESSAGES, {"messages": messages})
    surface.assert_refused(MESSAGES, answer, param="messages")


def test_beta_that_costs_more_than_tokens_does_not_reach_the_provider(surface: Surface) -> None:
    betas = (
        "files-api-2025-04-14, code-execution-2025-08-25,mcp-client-2025-04-04,"
        "web-fetch-2025-09-10,skills-2025-10-02,interleaved-thinking-2025-05-14"
    )
    surface.begin(MESSAGES)
    answer = MESSAGES.send(
        surface.client, surface.attacker.customer.key, headers={"anthropic-beta": betas}
    )
    assert answer.status_code == 200
    (received,) = surface.provider.requests
    assert received.headers["anthropic-beta"] == "interleaved-thinking-2025-05-14"
    surface.assert_harmless(MESSAGES, answer)


@pytest.mark.parametrize("call", [RESPONSES, MESSAGES], ids=["responses", "messages"])
@pytest.mark.parametrize("name", ["n", "max_tokens", "max_completion_tokens", "modalities"])
def test_another_apis_parameter_does_not_go_through_litellms_bridge(
    surface: Surface, call: Any, name: str
) -> None:
    if name in call.body:
        return
    model = "claude" if call is RESPONSES else "priced"  # the API that the model does not speak
    surface.provider.reset()
    answer = call.send(surface.client, surface.attacker.customer.key, {name: 5, "model": model})
    surface.assert_refused(call, answer, param=name)


@pytest.fixture(scope="module")
def answer_id(surface: Surface) -> str:
    """The id of a stored response of the bystander's."""
    answer = RESPONSES.send(surface.client, surface.bystander.customer.key)
    return answer.json()["id"]


def ask(surface: Surface, method: str, path: str, key: str) -> httpx.Response:
    return surface.client.request(method, path, headers={"authorization": f"Bearer {key}"})


TRICKS = [
    "{}",
    "{}?include[]=x",
    "{}?api_key=sk-evil",
    "{}/",
    "{}/cancel",
    "{}/input_items",
    "x/../{}",
    "x%2f..%2f{}",
    "%2e%2e/{}",
    "..%2f..%2fmodel/info?{}",
    "{}%00",
    "{}%0a",
    "{}%3Fx=1",
    "{}%23",
    "{};x",
    "{}%20",
    "resp_" + "A" * 2000,
    "..",
    "",
]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("trick", TRICKS)
def test_stored_response_of_another_account_is_not_there(
    surface: Surface, answer_id: str, method: str, trick: str
) -> None:
    surface.provider.reset()
    path = f"/v1/responses/{trick.format(answer_id)}"
    answer = ask(surface, method, path, surface.attacker.customer.key)
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["code"] in {"response_not_found", "unsupported_endpoint"}
    assert not surface.provider.requests


def test_stored_response_is_there_for_its_own_account(surface: Surface, answer_id: str) -> None:
    own = surface.bystander.customer.key
    answer = ask(surface, "GET", f"/v1/responses/{answer_id}?include[]=x&api_key=sk-evil", own)
    assert (answer.status_code, answer.json()["id"]) == (200, answer_id)
    assert surface.provider.last().query == ""
    follow = RESPONSES.send(surface.client, own, {"previous_response_id": answer_id})
    assert follow.status_code == 200, follow.text


@pytest.mark.parametrize("previous", ["{}", "resp_0123", "{}x", "{} "])
def test_nobody_goes_on_from_another_accounts_response(
    surface: Surface, answer_id: str, previous: str
) -> None:
    answer = surface.attack(RESPONSES, {"previous_response_id": previous.format(answer_id)})
    surface.assert_refused(RESPONSES, answer, 404, "previous_response_id")


@pytest.mark.parametrize("previous", ["", 5, ["x"], {}, "x" * 2000])
def test_previous_response_of_a_wrong_kind_is_refused(surface: Surface, previous: Any) -> None:
    answer = surface.attack(RESPONSES, {"previous_response_id": previous})
    surface.assert_refused(RESPONSES, answer, 400, "previous_response_id")


def test_answer_that_was_not_stored_is_the_providers_to_deny(surface: Surface) -> None:
    key = surface.attacker.customer.key
    surface.begin(RESPONSES)
    answer = RESPONSES.send(surface.client, key, {"store": False})
    assert answer.status_code == 200
    assert surface.provider.last().json()["store"] is False
    surface.assert_harmless(RESPONSES, answer)
    surface.provider.reply("priced", Reply(status=404))
    gone = ask(surface, "GET", f"/v1/responses/{answer.json()['id']}", key)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
    surface.provider.reset()
