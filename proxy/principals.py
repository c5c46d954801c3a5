"""From a virtual key to whose request it is.

A copy is kept for some seconds so that a request need not ask the database twice: the ledger's
authorization checks status, expiry and version of what the copy says in the same call that places
the hold, so that a revoked key is refused on the very next request all the same.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from proxy.accounts import KEY_PREFIX, ROLES, Accounts, Principal, hash_key
from proxy.attempts import FailedAttempts
from proxy.db import CONNECTION_ERRORS, unavailable
from proxy.errors import AuthenticationError, PermissionDeniedError
from proxy.exchange import Exchange
from proxy.key_uses import KeyUses
from proxy.networks import Addresses, is_within
from proxy.tiers import Tiers, offer

# A cap on memory, not a policy: beyond it the copies are dropped and read again.
_MAX_COPIES = 50_000


class Principals:
    """Authenticates virtual keys."""

    def __init__(
        self,
        accounts: Accounts,
        uses: KeyUses,
        *,
        cache_s: float,
        tiers: Tiers,
        addresses: Addresses,
        attempts: FailedAttempts,
    ) -> None:
        self._accounts = accounts
        self._used = uses.seen
        self._cache_s = cache_s
        self._tiers = tiers
        self._addresses = addresses
        self._attempts = attempts
        self._copies: dict[bytes, tuple[float, Principal]] = {}

    async def authenticate(
        self, exchange: Exchange, *, needs: str = "use", fresh: bool = False
    ) -> Principal:
        """Return whose key was sent; `needs` is what the key must be good for (`ROLES`).

        `fresh` asks the database whatever is cached: it must be true for requests that the ledger
        does not authorize itself. Raises AuthenticationError, PermissionDeniedError or
        MeteringUnavailableError.
        """
        key = exchange.virtual_key
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
            # What a copy refuses may be allowed by now; what it allows, the ledger checks again.
            if copy is not None and copy[0] > now:
                known = copy[1]
                is_plain = needs in ROLES[known.role] and known.allowed_networks is None
                if is_plain or self._misuse(known, exchange, needs) is None:
                    self._used[known.key_id] = (known.account_id, now)
                    return known
        # A key that was good a while ago is nobody's guess.
        if key_hash not in self._copies:
            self._attempts.check(exchange)
        try:
            principal = await self._read(key, key_hash)
        except AuthenticationError:
            self._attempts.note(exchange)
            raise
        if len(self._copies) >= _MAX_COPIES:
            self._copies.clear()
        self._copies[key_hash] = (now + self._cache_s, principal)
        misuse = self._misuse(principal, exchange, needs)
        if misuse is not None:
            raise misuse
        self._used[principal.key_id] = (principal.account_id, now)
        return principal

    def _misuse(
        self, principal: Principal, exchange: Exchange, needs: str
    ) -> PermissionDeniedError | None:
        if not principal.may(needs):
            message = (
                f"A key with the role {principal.role!r} may not do this. Use a key with the role "
                f"{'manage' if needs == 'manage' else 'inference'!r}; where you have none, ask the "
                "operator of this service for one."
            )
            return PermissionDeniedError(message)
        if principal.allowed_networks is not None:
            address = self._addresses.of(exchange.peer, exchange.header(b"x-forwarded-for"))
            if not is_within(address, principal.allowed_networks):
                message = (
                    f"This API key may not be used from {address or 'where you are'}. Use another "
                    "key, or add the network to its allowed_networks."
                )
                return PermissionDeniedError(message, code="network_not_allowed")
        return None

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
        return replace(principal, terms=self._tiers.of(principal.tier, principal.overrides))


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
    """Whether the key's models and its tier's, which may be patterns such as gpt-*, have this."""
    return _is_among(principal.allowed_models, model) and principal.terms.has_model(model)


def check_model(principal: Principal, model: str, *, is_known: bool) -> None:
    """Refuse a model that the key or the account may not use: PermissionDeniedError.

    Where another tier has it, the error says which; `is_known` is whether there is such a model.
    """
    if not _is_among(principal.allowed_models, model):
        msg = f"This API key may not use the model {model!r}. GET /v1/models lists what it may."
        raise PermissionDeniedError(msg, code="model_not_allowed", param="model")
    if not principal.terms.has_model(model):
        msg = f"This account, of the tier {principal.tier!r}, may not use the model {model!r}."
        error = PermissionDeniedError(msg, code="model_not_allowed", param="model")
        offer(error, principal.terms.tier_with_model(model) if is_known else None)
        raise error


def may_use_endpoint(principal: Principal, name: str) -> bool:
    """Whether the key's endpoints, which may be patterns such as audio.*, have this one."""
    return _is_among(principal.allowed_endpoints, name)


def _is_among(patterns: Sequence[str] | None, name: str) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
