"""What of a request may reach LiteLLM, and which of its headers may reach a customer.

LiteLLM takes its own settings from the same body as the model's parameters: whoever may write them
chooses the price, the route, the credentials and the logging of a call, and some of them reach
other customers' calls. So each top-level member is one of three things here:

- passed on: OpenAI's parameters, and what nobody here knows, since providers have their own;
- dropped: a label for records that the customer can't read;
- refused, with a 400 that names it: it would set what is the operator's to set, or cost what can't
  be reserved for.

The lists are our own; a test holds them against LiteLLM's.
"""

import re
from collections.abc import Mapping
from typing import NoReturn, cast

import msgspec

from proxy.errors import InvalidRequestError
from proxy.wire.fields import Fields, is_null, value_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# OpenAI's parameters of chat completions, and `thinking`, which LiteLLM has for all providers.
ALLOWED = _names(
    """
    model messages stream stream_options n max_tokens max_completion_tokens
    temperature top_p stop seed presence_penalty frequency_penalty logit_bias logprobs top_logprobs
    tools tool_choice parallel_tool_calls functions function_call response_format
    reasoning_effort thinking verbosity modalities audio prediction
    store user safety_identifier service_tier prompt_cache_key prompt_cache_retention
    """
)

# LiteLLM reads OpenAI's `metadata` as its own settings: tags that choose a route, callbacks'
# credentials, guardrails to leave out. `usage` asks OpenRouter for its cost.
DROPPED = _names(
    """
    metadata litellm_metadata tags usage session_id trace_id request_id
    litellm_call_id litellm_session_id litellm_trace_id
    """
)

# An SDK may send these as null; anything else asks for a service that is paid by the query.
_REFUSED_UNLESS_NULL = frozenset({"web_search_options"})

_OPERATORS = "it is for the operator of this service to set"
_CREDENTIALS = "bring your own provider key in a header instead"
_ONE_ROUTE = "`model` alone says what serves a request"
_OWN_COST = "what it costs can't be told beforehand"
_LIMITS = "limit an answer with max_tokens or max_completion_tokens, and n"
_STATE = "it refers to what is kept under the operator's account"

# Spelled like LiteLLM and the providers do; compared without case, hyphens and underscores.
_NAMES: Mapping[str, str] = {
    # Arguments of LiteLLM's functions, its settings and those of its router and prompt templates.
    # Some reach other customers: queues, cooldowns, callbacks of the whole process.
    """
    self args kwargs func acompletion aembedding aimg_generation atext_completion text_completion
    allm_passthrough_route original_function original_generic_function call_type async_call client
    use_client client_disconnected shared_session complete_response completion_call_id id order
    rust agent logger_fn verbose no_log turn_off_message_logging standard_logging_object
    error_information log_client_error_tracebacks internal_call_origin is_silent_experiment
    exception allowed_openai_params additional_drop_params drop_params
    enable_json_schema_validation merge_reasoning_content_in_choices stream_chunk_size
    stream_response keepalive_seconds allow_client_keepalive_override
    disable_add_transform_inline_image_block output_vector_size cache caching caching_groups ttl
    enable_prompt_caching priority weight weights rpm tpm itpm otpm max_budget budget_duration
    max_parallel_requests max_file_size_mb max_agentic_loops fastest_response attempted_targets
    policy_sources tag_regex enable_tag_filtering labels configurable_clientside_auth_params
    user_config ssl_verify use_ssl data_residency use_in_pass_through use_chat_completions_api
    client_side_timeout passthrough bos_token eos_token roles initial_prompt_value
    final_prompt_value custom_prompt_dict supports_system_message ensure_alternating_roles
    user_continue_message assistant_continue_message chat_template hf_model_name prompt prompt_id
    prompt_label prompt_variables prompt_version prompt_environment team_id agent_id end_user_id
    mm_processor_kwargs lora_request extra_body extra_query config session input contents
    acreate_batch acreate_fine_tuning_job amoderation arerank aresponses aspeech atranscription
    max_iterations max_budget_per_session cache_hit cache_control_injection_points background
    logging_obj service_logger_obj start_time completion_start_time complete_streaming_response
    async_complete_streaming_response combined_usage_object inherited_tags
    """: _OPERATORS,
    """
    api_key api_base api_version organization tenant_id client_id bucket_name use_xai_oauth
    workspace_id
    """: _CREDENTIALS,
    """
    custom_llm_provider models engine deployment deployment_id specific_deployment base_model
    silent_model provider providers route transforms
    """: _ONE_ROUTE,
    # Searches, code and further model calls on the provider's side, faster or other machines.
    """
    web_search web_search_options search_parameters search_settings search_tool_name enable_search
    plugins connectors mcp_servers container data_sources context_management speed inference_geo
    performance_config compound_custom include_server_side_tool_invocations betas
    additional_model_request_fields
    """: _OWN_COST,
    # Other providers' names for how much is said: they would outbid the limit that is reserved for.
    """
    best_of candidate_count sample_count num_return_sequences num_generations max_output_tokens
    max_new_tokens max_tokens_to_sample max_gen_len max_length max_completion_length
    max_generated_tokens max_token num_predict generation_config inference_config
    text_generation_config options parameters
    """: _LIMITS,
    """
    cached_content previous_response_id conversation vector_store_id vector_store_ids file_ids
    """: _STATE,
}

# A parameter with one of these words in its name is a setting, a credential or a destination.
_WORDS: Mapping[str, str] = {
    """
    litellm mock fallback fallbacks retry retries timeout cooldown callback callbacks guardrail
    guardrails header headers metadata proxy policies interception region cost costs pricing
    multiplier beta api span params
    """: _OPERATORS,
    """
    key token secret credential credentials password endpoint url uri host port webhook project
    tenant organization organizations
    """: _CREDENTIALS,
    "router routing model models deployment deployments": _ONE_ROUTE,
}

# Whose settings LiteLLM takes from the body: clouds, loggers, its own routers.
_FIRST_WORDS: Mapping[str, str] = {
    """
    agentcore anthropic arize aws azure bedrock braintrust datadog dd fireworks gcp gcs gemini
    gigachat helicone humanloop langfuse langsmith lunary mcp milvus newrelic nvcf oci openai opik
    otel phoenix pillar posthog redis s3 sagemaker signoz slack valkey vertex wandb watsonx weave
    """: _OPERATORS,
    "adaptive auto complexity quality": _ONE_ROUTE,
}

# Letters, digits and underscores: LiteLLM reads `metadata[tags]` as a member of `metadata`.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# A tool that the client runs itself. Any other member could name one that the provider or LiteLLM
# runs, at a price (Gemini: `googleSearch`) or with the operator's credentials (`server_url`).
_TOOL_MEMBERS = _names(
    """
    type function custom name description parameters input_schema strict cache_control
    input_examples eager_input_streaming defer_loading
    """
)
_TOOL_TYPES = ("function", "custom", None)
# LiteLLM runs functions of these names by itself where the operator set it up to.
_LITELLM_TOOL = "litellm_"

# The tiers at the price that is in the price list; the others are priced differently.
_TIERS = (None, "auto", "default")


def check_body(fields: Fields) -> Fields:
    """Return the members that may reach LiteLLM; raises InvalidRequestError for what may not."""
    passed: Fields = {}
    for name, value in fields.items():
        if name in DROPPED or (name in _REFUSED_UNLESS_NULL and is_null(value)):
            continue
        if name not in ALLOWED:
            _check_name(name)
        passed[name] = value
    if value_of(fields.get("service_tier")) not in _TIERS:
        _refuse("service_tier", _OWN_COST)
    for name in ("tools", "functions"):
        _check_tools(name, fields.get(name))
    return passed


def upstream_headers(request_id: str, master_key: str) -> dict[str, str]:
    """Return all headers of a request to LiteLLM: none of the customer's is among them."""
    return {
        "authorization": f"Bearer {master_key}",
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "accept-encoding": "identity",
        "user-agent": "tallygate",
        # Both sides' records join on it.
        "x-litellm-call-id": request_id,
    }


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        _refuse(name, "no parameter of a model is named like that")
    squashed = _squashed(name)
    if squashed in _SPELLINGS:
        _refuse(name, f"write it as {_SPELLINGS[squashed]}")
    words = _HUMP.sub("_", name).lower().split("_")
    reasons = (
        _REFUSED_NAMES.get(squashed),
        _REFUSED_FIRST_WORDS.get(words[0]),
        *map(_REFUSED_WORDS.get, words),
    )
    for reason in reasons:
        if reason is not None:
            _refuse(name, reason)


def _check_tools(name: str, member: msgspec.Raw | None) -> None:
    if member is None or is_null(member):
        return
    tools = value_of(member)
    if not isinstance(tools, list):
        raise InvalidRequestError(f"{name} must be a list of objects.", param=name)
    for tool in cast("list[object]", tools):
        if not isinstance(tool, dict):
            raise InvalidRequestError(f"{name} must be a list of objects.", param=name)
        _check_tool(name, cast("dict[str, object]", tool))


def _check_tool(param: str, tool: Mapping[str, object]) -> None:
    others = sorted(tool.keys() - _TOOL_MEMBERS)
    if tool.get("type") not in _TOOL_TYPES or others:
        what = others[0] if others else str(tool["type"])
        raise InvalidRequestError(
            f"Only tools that you run yourself are supported, not {what[:64]!r}.",
            code="unsupported_parameter",
            param=param,
        )
    for part in (tool, tool.get("function"), tool.get("custom")):
        if isinstance(part, dict):
            called = cast("dict[str, object]", part).get("name")
            if isinstance(called, str) and called.lower().startswith(_LITELLM_TOOL):
                raise InvalidRequestError(
                    f"A tool's name can't begin with {_LITELLM_TOOL!r}.",
                    code="unsupported_parameter",
                    param=param,
                )


def _refuse(name: str, reason: str) -> NoReturn:
    raise InvalidRequestError(
        f"The parameter {name[:64]!r} is not supported here: {reason}.",
        code="unsupported_parameter",
        param=name[:64],
    )


def _squashed(name: str) -> str:
    return name.lower().replace("_", "")


def _each(lists: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for names, reason in lists.items() for name in names.split()}


_REFUSED_NAMES = {_squashed(name): reason for name, reason in _each(_NAMES).items()}
_REFUSED_WORDS = _each(_WORDS)
_REFUSED_FIRST_WORDS = _each(_FIRST_WORDS)
# `maxTokens` would go past our reading of `max_tokens` and yet be understood by some provider.
_SPELLINGS = {_squashed(name): name for name in ALLOWED}
