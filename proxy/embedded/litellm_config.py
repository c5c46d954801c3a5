"""What the LiteLLM child gets: the operator's section, the settings we need, a clean environment.

LiteLLM looks many credentials up by itself, and falls back to them where a request brings a blank
one. So the child has none under a name that it knows: each variable that the configuration names
is handed over under another name, and the rest stays behind.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple, cast

logger = logging.getLogger(__name__)

REFERENCE = "os.environ/"
RENAMED = "TALLYGATE_UPSTREAM_"

# LiteLLM reads its prices, headers and banners from the internet unless told not to.
QUIET: Mapping[str, str] = {
    "DISABLE_ADMIN_UI": "True",
    "LITELLM_DONT_SHOW_FEEDBACK_BOX": "true",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "true",
    "LITELLM_LOG": "ERROR",
    # In "DEV" it loads the .env file of the working directory, and the keys in it.
    "LITELLM_MODE": "PRODUCTION",
    "NO_DOCS": "True",
    "NO_OPENAPI": "True",
    "NO_REDOC": "True",
    "PYTHONUNBUFFERED": "1",
}

# What a program needs to run at all, and the ambient credentials of the clouds, which no request
# can fall back to. Anything else is named in the configuration: `environment_variables` of
# LiteLLM's own format hands a variable over under the name that a callback wants.
PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_", "TZ", "TMPDIR", "XDG_",
    "SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "AWS_", "AZURE_CLIENT_", "AZURE_TENANT_", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_",
)  # fmt: skip


# LiteLLM imports it from the directory of its configuration file.
WITNESS_CALLBACK = "tallygate_witness.witness"


class WitnessAddress(NamedTuple):
    """Where the witness inside LiteLLM reports to: Tallygate's base URL, and its token."""

    url: str
    token: str


class ChildConfig(NamedTuple):
    """A configuration file's content and the environment that belongs to it."""

    document: dict[str, Any]
    environ: dict[str, str]


def child_config(
    section: Mapping[str, Any],
    *,
    master_key: str,
    environ: Mapping[str, str],
    witness: WitnessAddress | None = None,
) -> ChildConfig:
    """Merge the operator's `litellm:` section with what metering needs.

    A model that names a variable which is not set, or is empty, is left out and logged.
    """
    document: dict[str, Any] = deepcopy(dict(section))
    document["model_list"] = _usable(document.get("model_list") or [], environ)
    _merge(
        document,
        "general_settings",
        # Without it a stream of text completions never says what it used.
        forced={"master_key": master_key, "always_include_stream_usage": True},
    )
    _merge(
        document,
        "litellm_settings",
        forced={
            "telemetry": False,
            "include_cost_in_streaming_usage": True,
            # A hit would be reported at its full price.
            "cache": False,
        },
        # As long as the relay waits.
        default={"request_timeout": 900},
    )
    _merge(
        document,
        "router_settings",
        forced={},
        # One refused server key, or one hostile request, would take a model from everybody.
        default={"disable_cooldowns": True},
    )
    reporting: dict[str, str] = {}
    if witness is not None:
        settings = document["litellm_settings"]
        settings["callbacks"] = [*_listed(settings.get("callbacks")), WITNESS_CALLBACK]
        reporting = {
            "TALLYGATE_WITNESS_URL": witness.url,
            "TALLYGATE_WITNESS_TOKEN": witness.token,
        }
    renamed: dict[str, str] = {}
    document = cast("dict[str, Any]", _rename(document, environ, renamed))
    passed = {
        name: text
        for name, text in environ.items()
        if name.startswith(PASSED) and not name.endswith("_API_KEY")
    }
    return ChildConfig(document, {**passed, **QUIET, **renamed, **reporting})


def _listed(value: object) -> list[object]:
    """Return the operator's callbacks: LiteLLM takes one by itself as well as a list."""
    if isinstance(value, list):
        return cast("list[object]", value)
    return [] if value is None else [value]


def _merge(
    document: dict[str, Any],
    name: str,
    *,
    forced: Mapping[str, object],
    default: Mapping[str, object] | None = None,
) -> None:
    document[name] = {**(default or {}), **(document.get(name) or {}), **forced}


def _usable(models: list[dict[str, Any]], environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the models whose variables are all set."""
    usable: list[dict[str, Any]] = []
    for model in models:
        missing = sorted(n for n in _references(model) if not environ.get(n))
        if missing:
            logger.info(
                "model left out: its variable is not set",
                extra={"model": model.get("model_name"), "variables": missing},
            )
        else:
            usable.append(model)
    return usable


def _references(value: object) -> set[str]:
    if isinstance(value, str) and value.startswith(REFERENCE):
        return {value.removeprefix(REFERENCE)}
    if isinstance(value, dict):
        members = cast("dict[str, object]", value).values()
    elif isinstance(value, list):
        members = cast("list[object]", value)
    else:
        return set()
    return {name for member in members for name in _references(member)}


def _rename(value: object, environ: Mapping[str, str], renamed: dict[str, str]) -> object:
    """Return `value` with its references renamed; what they stand for is added to `renamed`."""
    if isinstance(value, str) and value.startswith(REFERENCE):
        name = value.removeprefix(REFERENCE)
        if name in environ:
            renamed[RENAMED + name] = environ[name]
        return REFERENCE + RENAMED + name
    if isinstance(value, dict):
        items = cast("dict[str, object]", value).items()
        return {key: _rename(member, environ, renamed) for key, member in items}
    if isinstance(value, list):
        return [_rename(member, environ, renamed) for member in cast("list[object]", value)]
    return value
