"""What of a customer's request may reach LiteLLM, and what of its answer may reach the customer.

LiteLLM takes its own settings from the very body that it forwards: other credentials, other routes,
retries, prices, log sinks. A name that it knows as its own is refused here, or dropped where SDKs
send it in good faith; any other unknown name passes, because it may be a provider's parameter.
Names were taken from LiteLLM 1.106.2; a test reads the list of the version in use and fails for a
name that is in none of the sets below.
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from proxy.errors import InvalidRequestError

# OpenAI's own parameters of a chat completion, and what other providers commonly take. They are
# looked up first: some look like names that the patterns refuse.
ALLOWED = frozenset(
    """
    model messages stream stream_options temperature top_p n stop max_tokens max_completion_tokens
    presence_penalty frequency_penalty logit_bias logprobs top_logprobs user seed tools tool_choice
    parallel_tool_calls functions function_call response_format modalities audio prediction
    reasoning_effort verbosity web_search_options store service_tier safety_identifier
    prompt_cache_key prompt_cache_retention thinking reasoning top_k min_p repetition_penalty
    safety_settings safe_prompt context_management
    """.split()
)

# Meant for others than the provider and harmless to leave out; OpenAI's `metadata` is for its own
# dashboard, while LiteLLM steers its routing and logging by it.
DROPPED = frozenset({"metadata", "tags", "no-log", "litellm_call_id", "litellm_session_id",
                     "litellm_trace_id", "litellm_metadata", "user_id"})

# LiteLLM's own settings, by what they would do.
REFUSED = frozenset(
    """
    api_base base_url api_version organization region_name custom_llm_provider deployment_id
    model_list model_info model_config model_alias_map base_model hf_model_name silent_model
    user_config azure use_litellm_proxy use_client use_xai_oauth use_in_pass_through client
    use_chat_completions_api shared_session ssl_verify use_ssl default_headers headers extra_headers
    extra_body extra_query provider_specific_header provider_affinity_header secret_fields
    proxy_server_request specific_deployment allow_client_keepalive_override keepalive_seconds
    configurable_clientside_auth_params client_id client_secret tenant_id workspace_id
    allowed_model_region data_residency rust self id
    fallbacks context_window_fallback_dict content_policy_fallbacks default_fallbacks
    fallback_depth max_fallbacks num_retries max_retries retry_policy retry_strategy order weight
    routing_strategy attempted_targets allowed_fails cooldown_time fastest_response
    timeout request_timeout stream_timeout force_timeout client_side_timeout
    timeout_by_service_tier stream_timeout_by_service_tier
    cache caching caching_groups cache_key preset_cache_key ttl enable_prompt_caching
    tpm rpm itpm otpm max_parallel_requests max_budget budget_duration
    default_api_key_rpm_limit default_api_key_tpm_limit
    logger_fn verbose log_client_error_tracebacks turn_off_message_logging callbacks
    success_callback failure_callback service_callback complete_response completion_call_id
    async_call acompletion aembedding aimg_generation atext_completion text_completion
    allm_passthrough_route stream_response stream_chunk_size max_agentic_loops
    guardrails guardrail_config policies prompt_id prompt_label prompt_version prompt_variables
    prompt_environment custom_prompt_dict roles initial_prompt_value final_prompt_value bos_token
    eos_token assistant_continue_message user_continue_message ensure_alternating_roles
    supports_system_message enable_json_schema_validation merge_reasoning_content_in_choices
    disable_add_transform_inline_image_block max_file_size_mb model_file_id_mapping
    allowed_openai_params additional_drop_params drop_params enable_tag_filtering tag_regex
    fireworks_forward_user_id search_tool_name output_vector_size tiered_pricing
    vector_store_ids include_server_side_tool_invocations bedrock_tags user_api_key_auth_metadata
    """.split()
)

# Families of names: whatever LiteLLM adds to them is refused as well.
_REFUSED_PATTERNS = re.compile(
    r"""
      ^_                                             # LiteLLM's internals
    | ^(?:litellm|mock|api|aws|azure|vertex|bedrock|sagemaker|watsonx|oci|databricks)[_-]
    | ^(?:anthropic|openai|gemini|google|s3|gcs|dd|hf|nvcf|agentcore)[_-]  # identities, buckets
    | ^(?:langfuse|langsmith|arize|phoenix|posthog|newrelic|wandb|weave|humanloop|signoz|lago|
          slack|braintrust|opik|helicone|galileo|otel|datadog|sentry|logfire|athina|promptlayer|lunary)
    | ^user_api_key | ^x[_-] | _router_ | ^routing_ | ^regional_
    | cost | (?:api_key|apikey|_secret|_secret_key|_credentials?|_url|_endpoint|_callbacks?)$
    """,
    re.VERBOSE,
)

_SERVICE_TIERS = frozenset({None, "auto", "default"})


def check_body(fields: Mapping[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    """Return the members that may pass; InvalidRequestError for one that is refused."""
    passing: dict[str, msgspec.Raw] = {}
    for name, value in fields.items():
        if name in ALLOWED:
            passing[name] = value
        elif is_refused(name):
            raise _refused(name)
        elif name.lower() not in DROPPED:
            passing[name] = value
    _check_service_tier(passing)
    _check_tools(passing)
    _check_urls(passing)
    return passing


def is_refused(name: str) -> bool:
    """Whether a member of this name is refused; the case of the name makes no difference."""
    plain = name.lower()
    if plain in DROPPED or plain in ALLOWED:
        # A name that only differs in case from one that we read is a parser's difference: refused.
        return plain in ALLOWED and name not in ALLOWED
    return plain in REFUSED or _REFUSED_PATTERNS.search(plain) is not None


def _refused(name: str) -> InvalidRequestError:
    if name.lower() == "api_key":
        msg = "To use your own provider key, send it in the header X-Provider-Key, not in the body."
    else:
        msg = f"The parameter {name!r} is not accepted here. Leave it out."
    return InvalidRequestError(msg, param=name[:100], code="unsupported_parameter")


def _check_service_tier(fields: Mapping[str, msgspec.Raw]) -> None:
    """Other tiers have other prices, by which the hold was not reckoned."""
    if "service_tier" not in fields:
        return
    tier = msgspec.json.decode(fields["service_tier"])
    if not isinstance(tier, str | None) or tier not in _SERVICE_TIERS:
        msg = "service_tier must be 'auto' or 'default'."
        raise InvalidRequestError(msg, param="service_tier", code="unsupported_parameter")


def _check_tools(fields: Mapping[str, msgspec.Raw]) -> None:
    """Some tools are run by LiteLLM itself, with the operator's rights, and not by the model."""
    tools = bytes(fields.get("tools", b""))
    if b"mcp" not in tools.lower() and b"litellm" not in tools.lower() and b"\\u" not in tools:
        return
    for tool in _objects(msgspec.json.decode(tools)):
        kind = str(tool.get("type", "")).lower()
        if kind == "mcp" or kind.startswith("litellm") or "litellm_params" in tool:
            msg = f"Tools of type {kind[:50]!r} are not offered here."
            raise InvalidRequestError(msg, param="tools", code="unsupported_parameter")


def _check_urls(fields: Mapping[str, msgspec.Raw]) -> None:
    """LiteLLM fetches some images itself: an address inside the operator's network is refused."""
    messages = bytes(fields.get("messages", b""))
    if b"_url" not in messages and b"\\u" not in messages:
        return
    for message in _objects(msgspec.json.decode(messages)):
        for part in _objects(message.get("content")):
            for name, value in part.items():
                if name.endswith("_url"):
                    inner = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
                    _check_url(inner.get("url", value))


def _check_url(url: object) -> None:
    if not isinstance(url, str) or url.startswith("data:"):
        return
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".").lower()
        is_public = parts.scheme in {"http", "https", "gs"} and host != "localhost"
        if is_public and re.fullmatch(r"[0-9a-fx.:]+", host):
            is_public = ipaddress.ip_address(host).is_global
    except ValueError:
        is_public = False
    if not is_public:
        msg = "A URL in a message must be a data URL or lead to a public http or https address."
        raise InvalidRequestError(msg, param="messages", code="unsupported_url")


def _objects(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        return []
    return [item for item in cast("list[Any]", value) if isinstance(item, dict)]


# --- headers ---------------------------------------------------------------------------------


def upstream_headers(request_id: str, master_key: str) -> dict[str, str]:
    """Headers for LiteLLM: none of the customer's, and our request id so that records join."""
    return {
        "authorization": f"Bearer {master_key}",
        "content-type": "application/json",
        "x-litellm-call-id": request_id,
    }


def client_headers(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers of an answer that the customer may see; everything else tells of the inside."""
    content_type = headers.get("content-type", "application/json")
    return [(b"content-type", content_type.encode("latin-1", "replace"))]
