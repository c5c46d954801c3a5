"""Bring your own key: which provider key, of those a customer sent, this call goes out with."""

from collections.abc import Callable, Mapping

from proxy.errors import InvalidRequestError

ANY_PROVIDER = "*"


def choose_provider_key(
    header: Callable[[bytes], str | None], names: Mapping[str, str], provider: str | None
) -> str | None:
    """Return the key for a model of `provider`; None if the call is to be paid with credits.

    `names` maps header names to providers, "*" for any. A key for another provider is left alone:
    clients set all of theirs once, and call what they like. A blank key is refused, because LiteLLM
    would use the operator's in its place.
    """
    chosen: str | None = None
    for name, of_provider in names.items():
        value = header(name.lower().encode())
        if value is None:
            continue
        key = value.strip()
        if not key:
            msg = f"The header {name} is blank. Put the provider's key into it, or leave it out."
            raise InvalidRequestError(msg, code="blank_provider_key", param=name)
        if of_provider == provider or (of_provider == ANY_PROVIDER and chosen is None):
            chosen = key
    return chosen
