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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, cast

import msgspec

from proxy.errors import InvalidRequestError
from proxy.wire.fields import Fields, is_null, value_of
from proxy.wire.form import Form


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
_ANOTHER = "this endpoint has no such parameter, and what it costs there is not reckoned here"

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
    end_time additional_args log_event_type httpx_response original_response raw_request_typed_dict
    traceback_exception has_logged_async_success has_logged_async_failure
    has_dispatched_final_stream_success prompt_cache_response_complete billed_failed_attempts
    batch_usage batch_successful_requests batch_failed_requests request_data response_status
    user_props prompt_integration first_message follow_redirects is_async completion adapter_id
    realtime_tools realtime_tool_calls aget_responses acancel_responses adelete_responses
    acompact_responses alist_input_items safeguards text_format
    alerting_config allowed_fails allowed_fails_policy assistants_config cache_kwargs
    cache_responses client_ttl debug_level default_max_parallel_requests default_priority
    disable_cooldowns enable_pre_call_checks optional_pre_call_checks enable_weighted_failover
    health_check_ignore_transient_errors health_check_staleness_threshold polling_interval
    provider_budget_config search_tools set_verbose tag_filtering_match_any
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
    additional_model_request_fields compaction
    """: _OWN_COST,
    # Where LiteLLM turns a request of one API into one of another, it takes the other's parameters
    # as well: ten answers of a chat, where nothing here reads `n`.
    """
    messages n max_tokens max_completion_tokens modalities audio prediction service_tier stream
    partial_images system system_instruction
    """: _ANOTHER,
    # Other providers' names for how much is said: they would outbid the limit that is reserved for.
    """
    best_of candidate_count sample_count num_return_sequences num_generations max_output_tokens
    max_new_tokens max_tokens_to_sample max_gen_len max_length max_completion_length
    max_generated_tokens max_token num_predict generation_config inference_config
    text_generation_config options parameters
    """: _LIMITS,
    """
    cached_content previous_response_id conversation vector_store_id vector_store_ids file_ids
    response_id container_id input_file_id file purpose
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
    type function custom name description parameters input_schema strict format cache_control
    input_examples eager_input_streaming defer_loading
    """
)
_TOOL_TYPES = ("function", "custom", None)
# LiteLLM runs functions of these names by itself where the operator set it up to.
_LITELLM_TOOL = "litellm_"

# Anthropic's tools that the client runs: they cost the tokens of their calls and nothing else.
_ANTHROPIC_CLIENT_TOOL = re.compile(r"(?:bash|text_editor|computer|memory)_20\d{6}")
_ANTHROPIC_TOOL_MEMBERS = _TOOL_MEMBERS | _names(
    "max_characters display_width_px display_height_px display_number enable_zoom"
)

# The tiers whose prices LiteLLM's price map has; `auto` is whatever the account is set to.
_TIERS = (None, "auto", "default", "flex", "priority", "standard_only")

# Anthropic's betas that change the tokens of an answer, and no price that we do not reckon with.
_BETAS = re.compile(
    r"(?:claude-code|interleaved-thinking|fine-grained-tool-streaming|token-efficient-tools"
    r"|prompt-caching|extended-cache-ttl|output-128k|context-1m|computer-use|effort"
    r"|structured-outputs|tool-examples|max-tokens-3-5-sonnet)-20\d{2}-\d{2}-\d{2}|claude-code-20\d{6}"
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What an endpoint's bodies may hold.

    `allowed` are the parameters of its reference. `is_open` is whether others may pass too, as
    far as they are no setting of anybody's: then they can only change how many tokens an answer
    has, which is bounded. Where an answer is not paid by the token they can't be let through.
    `files` are the parts of a form that are files, and can't be texts.
    """

    allowed: frozenset[str]
    is_open: bool = False
    files: frozenset[str] = frozenset()


CHAT = Policy(ALLOWED, is_open=True)
COMPLETIONS = Policy(
    _names(
        """
        model prompt stream stream_options n best_of max_tokens temperature top_p stop seed suffix
        echo presence_penalty frequency_penalty logit_bias logprobs user
        """
    ),
    is_open=True,
)
EMBEDDINGS = Policy(
    _names("model input encoding_format dimensions user input_type truncate"), is_open=True
)
RESPONSES = Policy(
    _names(
        """
        model input instructions stream stream_options max_output_tokens max_tool_calls temperature
        top_p top_logprobs include parallel_tool_calls previous_response_id reasoning
        safety_identifier prompt_cache_key prompt_cache_retention service_tier store text
        tool_choice tools truncation user verbosity background
        """
    ),
    is_open=True,
)
MESSAGES = Policy(
    _names(
        """
        model messages system max_tokens stream stop_sequences temperature top_k top_p thinking
        tools tool_choice service_tier output_config output_format cache_control
        """
    ),
    is_open=True,
)
IMAGES = Policy(
    _names(
        """
        model prompt n size quality style response_format background moderation output_format
        output_compression user partial_images stream
        """
    )
)
IMAGE_EDITS = Policy(
    IMAGES.allowed | _names("input_fidelity"), files=_names("image image[] mask mask[]")
)
SPEECH = Policy(_names("model input voice instructions response_format speed stream_format"))
SOUND = Policy(
    _names(
        """
        model language prompt response_format temperature timestamp_granularities
        timestamp_granularities[] include include[] chunking_strategy stream
        """
    ),
    files=frozenset({"file"}),
)
MODERATIONS = Policy(_names("model input"))
RERANK = Policy(
    _names(
        """
        model query documents top_n return_documents rank_fields max_chunks_per_doc
        max_tokens_per_doc
        """
    )
)


def check_body(fields: Fields, policy: Policy = CHAT) -> Fields:
    """Return the members that may reach LiteLLM; raises InvalidRequestError for what may not."""
    passed: Fields = {}
    for name, value in fields.items():
        if name not in policy.allowed:
            if name in DROPPED or (name in _REFUSED_UNLESS_NULL and is_null(value)):
                continue
            _check_name(name, policy)
        passed[name] = value
    if "service_tier" in fields and value_of(fields["service_tier"]) not in _TIERS:
        _refuse("service_tier", _OWN_COST)
    for name in ("tools", "functions"):
        if name in fields:
            check = _check_anthropic_tool if policy is MESSAGES else _check_tool
            _check_tools(name, fields[name], check)
    return passed


def check_form(form: Form, policy: Policy) -> list[tuple[str, str]]:
    """Return the texts of a form that may reach LiteLLM; raises InvalidRequestError."""
    for file in form.files:
        # A file by the name of a text would be read in its place, or go on unread.
        if file.name not in policy.files:
            _refuse(file.name, "no file is taken by that name")
    given: set[str] = set()
    for name, _ in form.texts:
        if name in policy.files:
            _refuse(name, "send it as a file")
        if name in given and not name.endswith("[]"):
            _refuse(name, "it is given more than once")
        given.add(name)
        if name not in policy.allowed and name not in DROPPED:
            _check_name(name, policy)
    return [(name, text) for name, text in form.texts if name in policy.allowed]


_UPSTREAM_HEADERS = {
    "content-type": "application/json",
    "accept": "application/json, text/event-stream",
    "accept-encoding": "identity",
    "user-agent": "tallygate",
}


def upstream_headers(
    request_id: str, account_id: str, master_key: str, betas: str | None = None
) -> dict[str, str]:
    """Return all headers of a request to LiteLLM.

    None of the customer's is among them, but for those of Anthropic's betas that are known.
    """
    headers = {
        **_UPSTREAM_HEADERS,
        "authorization": f"Bearer {master_key}",
        # Both sides' records join on it.
        "x-litellm-call-id": request_id,
        # For the witness inside LiteLLM, whose reports are looked up by it.
        "x-tallygate-account": account_id,
    }
    if betas is not None:
        known = [beta for beta in betas.replace(",", " ").split() if _BETAS.fullmatch(beta)]
        if known:
            headers["anthropic-beta"] = ",".join(known)
    return headers


def _check_name(name: str, policy: Policy) -> None:
    if not _NAME.fullmatch(name):
        _refuse(name, "no parameter of a model is named like that")
    squashed = _squashed(name)
    for allowed in policy.allowed:
        # `maxTokens` would go past our reading of `max_tokens`, and yet some provider reads it.
        if _squashed(allowed) == squashed:
            _refuse(name, f"write it as {allowed}")
    words = _HUMP.sub("_", name).lower().split("_")
    reasons = (
        _REFUSED_NAMES.get(squashed),
        _REFUSED_FIRST_WORDS.get(words[0]),
        *map(_REFUSED_WORDS.get, words),
    )
    for reason in reasons:
        if reason is not None:
            _refuse(name, reason)
    if not policy.is_open:
        _refuse(name, "this endpoint has no such parameter")


def _check_tools(
    name: str,
    member: msgspec.Raw | None,
    check: Callable[[str, Mapping[str, object]], None],
) -> None:
    if member is None or is_null(member):
        return
    tools = value_of(member)
    if not isinstance(tools, list):
        raise InvalidRequestError(f"{name} must be a list of objects.", param=name)
    for tool in cast("list[object]", tools):
        if not isinstance(tool, dict):
            raise InvalidRequestError(f"{name} must be a list of objects.", param=name)
        check(name, cast("dict[str, object]", tool))


def _check_anthropic_tool(param: str, tool: Mapping[str, object]) -> None:
    kind = tool.get("type")
    is_known = isinstance(kind, str) and _ANTHROPIC_CLIENT_TOOL.fullmatch(kind)
    if not is_known or tool.keys() - _ANTHROPIC_TOOL_MEMBERS:
        _check_tool(param, tool)


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
