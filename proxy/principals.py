"""From a virtual key to whose request it is.

A copy is kept for some seconds so that a request need not ask the database twice: the ledger's
authorization checks status, expiry and version of what the copy says in the same call that places
the hold, so that a revoked key is refused on the very next request all the same.
"""

import time
from fnmatch import fnmatchcase

from proxy.accounts import KEY_PREFIX, Accounts, Principal, hash_key
from proxy.db import CONNECTION_ERRORS, unavailable
from proxy.errors import AuthenticationError, PermissionDeniedError

# A cap on memory, not a policy: beyond it the copies are dropped and read again.
_MAX_COPIES = 50_000


class Principals:
    """Authenticates virtual keys."""

    def __init__(self, accounts: Accounts, *, cache_s: float) -> None:
        self._accounts = accounts
        self._cache_s = cache_s
        self._copies: dict[bytes, tuple[float, Principal]] = {}

    async def authenticate(self, key: str | None, *, fresh: bool = False) -> Principal:
        """Return the key's principal; `fresh` asks the database whatever is cached.

        For requests that the ledger does not authorize itself, `fresh` must be true. Raises
        AuthenticationError, PermissionDeniedError or MeteringUnavailableError.
        """
        if not key:
            msg = (
                "No API key was sent. Send your Tallygate key as 'Authorization: Bearer sk-…' or "
                "as 'x-api-key'."
            )
            raise AuthenticationError(msg)
        key_hash = hash_key(key)
        now = time.monotonic()
        if not fresh:
            copy = self._copies.get(key_hash)
            if copy is not None and copy[0] > now:
                return copy[1]
        principal = await self._read(key, key_hash)
        if len(self._copies) >= _MAX_COPIES:
            self._copies.clear()
        self._copies[key_hash] = (now + self._cache_s, principal)
        return principal

    async def _read(self, key: str, key_hash: bytes) -> Principal:
        self._copies.pop(key_hash, None)
        principal = None
        if key.startswith(KEY_PREFIX):
            try:
                principal = await self._accounts.principal(key_hash)
            except CONNECTION_ERRORS as error:
                raise unavailable() from error
        if principal is None:
            raise refusal("unknown_key")
        if principal.key_status == "revoked":
            raise refusal("key_revoked")
        if principal.is_expired:
            raise refusal("key_expired")
        if principal.account_status != "active":
            raise refusal(f"account_{principal.account_status}")
        return principal


def refusal(outcome: str) -> AuthenticationError | PermissionDeniedError:
    """What a customer hears of a key that may not be used; outcomes as of authorize_batch."""
    if outcome == "key_expired":
        msg = "This API key has expired. Create a new one."
        return PermissionDeniedError(msg, code="key_expired")
    if outcome in {"account_suspended", "account_closed"}:
        msg = f"This account is {outcome.removeprefix('account_')}. Contact the operator."
        return PermissionDeniedError(msg, code=outcome)
    if outcome == "key_revoked":
        return AuthenticationError("Incorrect API key provided: it was revoked. Use another one.")
    # In OpenAI's words, by which LiteLLM's SDK knows what its exception is to be.
    return AuthenticationError(
        "Incorrect API key provided: it is not known here. Check that it was copied whole."
    )


def may_use_model(principal: Principal, model: str) -> bool:
    """Whether the key's list of models, which may hold patterns such as gpt-*, has this one."""
    patterns = principal.allowed_models
    return patterns is None or any(fnmatchcase(model, pattern) for pattern in patterns)
