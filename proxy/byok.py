"""Bring your own key: which provider key, of those a customer sent, this call goes out with.

And with nothing else: LiteLLM's fallbacks would show it to whichever provider comes next.
"""

from collections.abc import Callable, Sequence

from proxy.errors import InvalidRequestError

ANY_PROVIDER = "*"


def choose_provider_key(
    header: Callable[[bytes], str | None],
    names: Sequence[tuple[str, bytes, str]],
    provider: str | None,
) -> str | None:
    """Return the key for a model of `provider`; None if the call is to be paid with credits.

    `names` are headers as shown and as sent, with the provider of each, "*" for any. A key for
    another provider is left alone: clients set all of theirs once, and call what they like. A blank
    key is refused, because LiteLLM would use the operator's in its place.
    """
    chosen: str | None = None
    for name, sent, of_provider in names:
        value = header(sent)
        if value is None:
            continue
        key = value.strip()
        if not key:
            msg = f"The header {name} is blank. Put the provider's key into it, or leave it out."
            raise InvalidRequestError(msg, code="blank_provider_key", param=name)
        if of_provider == provider or (of_provider == ANY_PROVIDER and chosen is None):
            chosen = key
    return chosen


def members_with_key(key: str) -> dict[str, object]:
    """Return what a body for LiteLLM holds for the call to go out with `key` alone."""
    return {"api_key": key, "disable_fallbacks": True}


def texts_with_key(key: str) -> dict[str, str]:
    """Return the same for a form, whose texts LiteLLM takes for no `true`: empty lists."""
    fallbacks = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")
    return {"api_key": key, **dict.fromkeys(fallbacks, "")}
