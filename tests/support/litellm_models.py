"""The models that the tests' LiteLLM has, each with the price that a test reckons with."""

from collections.abc import Mapping
from typing import Any

PRICES = {"input_cost_per_token": 1e-06, "output_cost_per_token": 1e-05}
LIMITS = {"mode": "chat", "max_input_tokens": 8192, "max_output_tokens": 1024}
# Anthropic's relation of prices: 1.25 of the input to write for five minutes, 2 for an hour.
CACHE_PRICES = {
    "cache_read_input_token_cost": 1e-07,
    "cache_creation_input_token_cost": 1.25e-06,
    "cache_creation_input_token_cost_above_1hr": 2e-06,
}
EMBED = {"mode": "embedding", "max_input_tokens": 8192, "output_vector_size": 3}
INSTRUCT = {**LIMITS, "mode": "completion"}
IMAGE = {"mode": "image_generation"}
IMAGE_TOKEN_PRICES = {
    "input_cost_per_token": 5e-06,
    "input_cost_per_image_token": 1e-05,
    "output_cost_per_token": 3e-05,
    "output_cost_per_image_token": 4e-05,
}
SPEECH = {"mode": "audio_speech"}
TRANSCRIBE = {"mode": "audio_transcription"}
MODERATE = {"mode": "moderation"}
RERANK = {"mode": "rerank", "max_query_tokens": 2048}

# Name for customers -> LiteLLM's model_info. At the provider they have the same name, which is
# in no price map, so that these prices are the only ones.
_PRICED: dict[str, dict[str, Any]] = {
    "priced": {**LIMITS, **PRICES},
    "dear": {**LIMITS, "input_cost_per_token": 1e-3, "output_cost_per_token": 2e-3},
    "odd-cents": {**LIMITS, "input_cost_per_token": 1.875e-08, "output_cost_per_token": 7.5e-08},
    "cached": {**LIMITS, **PRICES, "cache_read_input_token_cost": 1e-07},
    "free": {**LIMITS, "input_cost_per_token": 0, "output_cost_per_token": 0},
    "unpriced": LIMITS,
    "tiered": {
        **LIMITS,
        **PRICES,
        "max_input_tokens": 1_000_000,
        "cache_read_input_token_cost": 1e-07,
        "input_cost_per_token_above_128k_tokens": 2e-06,
        "output_cost_per_token_above_128k_tokens": 2e-05,
        "input_cost_per_token_above_200k_tokens": 4e-06,
        "output_cost_per_token_above_200k_tokens": 4e-05,
        "cache_read_input_token_cost_above_200k_tokens": 4e-07,
        "input_cost_per_token_above_272k_tokens": 8e-06,
        "output_cost_per_token_above_272k_tokens": 8e-05,
        "cache_read_input_token_cost_above_272k_tokens": 8e-07,
    },
    "service-tiered": {
        **LIMITS,
        **PRICES,
        "input_cost_per_token_flex": 5e-07,
        "output_cost_per_token_flex": 5e-06,
        "input_cost_per_token_priority": 2e-06,
        "output_cost_per_token_priority": 2e-05,
    },
    "reasoning": {
        **LIMITS,
        **PRICES,
        "output_cost_per_reasoning_token": 3e-05,
        "supports_reasoning": True,
    },
    "audio-chat": {
        **LIMITS,
        **PRICES,
        "input_cost_per_audio_token": 4e-05,
        "output_cost_per_audio_token": 8e-05,
        "supports_audio_input": True,
        "supports_audio_output": True,
    },
    "searching": {
        **LIMITS,
        **PRICES,
        "search_context_cost_per_query": {
            "search_context_size_low": 0.01,
            "search_context_size_medium": 0.02,
            "search_context_size_high": 0.03,
        },
        "supports_web_search": True,
    },
    "claude-cheap": {**LIMITS, "input_cost_per_token": 1e-07, "output_cost_per_token": 5e-07},
    # LiteLLM prices an image's tokens only where "gpt-image" is in the name: the first of these two
    # comes without a cost.
    "image-tokens": {**IMAGE, **IMAGE_TOKEN_PRICES},
    "gpt-image-tokens": {**IMAGE, **IMAGE_TOKEN_PRICES},
    # LiteLLM prices characters only from its own price map, which knows this name: 0.000015 each.
    # "speech" comes without a cost.
    "tts-1": SPEECH,
    "speech-tokens": {
        **SPEECH,
        "input_cost_per_token": 2.5e-06,
        "output_cost_per_token": 1e-05,
        "output_cost_per_audio_token": 1.2e-05,
    },
    "transcribe-tokens": {
        **TRANSCRIBE,
        "input_cost_per_token": 2.5e-06,
        "output_cost_per_token": 1e-05,
        "input_cost_per_audio_token": 6e-06,
    },
}

# An endpoint's main model, which has an unpriced and a free twin.
_TWINNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "embed": (EMBED, {"input_cost_per_token": 2e-08, "output_cost_per_token": 0}),
    "instruct": (INSTRUCT, {"input_cost_per_token": 1.5e-06, "output_cost_per_token": 2e-06}),
    "claude": (LIMITS, {**PRICES, **CACHE_PRICES}),
    "image": (IMAGE, {"input_cost_per_image": 0.04}),
    "speech": (SPEECH, {"input_cost_per_character": 1.5e-05}),
    "transcribe": (TRANSCRIBE, {"input_cost_per_second": 0.0001, "output_cost_per_second": 0}),
    "rerank": (RERANK, {"input_cost_per_query": 0.002}),
}


def _with_twins() -> dict[str, dict[str, Any]]:
    models = dict(_PRICED)
    for name, (limits, prices) in _TWINNED.items():
        models[name] = {**limits, **prices}
        models[f"{name}-unpriced"] = limits
        models[f"{name}-free"] = {**limits, **dict.fromkeys(prices, 0)}
    # Moderations are free at every provider, which has to be said all the same.
    models["moderate"] = {**MODERATE, "input_cost_per_token": 0, "output_cost_per_token": 0}
    models["moderate-unpriced"] = MODERATE
    return models


MODELS: Mapping[str, dict[str, Any]] = _with_twins()


def litellm_params(name: str, provider_url: str) -> dict[str, Any]:
    """Return where a model is; the first word of its name says whose API it speaks."""
    family = name.partition("-")[0]
    prefix, base = {
        "claude": ("anthropic", provider_url.removesuffix("/v1")),
        "instruct": ("text-completion-openai", provider_url),
        "rerank": ("cohere", provider_url.removesuffix("/v1")),
    }.get(family, ("openai", provider_url))
    return {
        "model": f"{prefix}/{name}",
        "api_base": base,
        "api_key": "os.environ/PROVIDER_KEY",
    }
