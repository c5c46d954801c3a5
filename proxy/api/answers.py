"""What the endpoints answer, as types: the documentation is made of them, and tests hold to them.

Amounts are decimal text in credits and US dollars, times are UTC, ids are uuids. An answer has all
members of its type and no other.
"""

from datetime import datetime
from typing import Generic, Literal, TypeVar
from uuid import UUID

from pydantic import ConfigDict
from typing_extensions import TypedDict

Item = TypeVar("Item")

AccountStatus = Literal["active", "suspended", "closed"]
KeyStatus = Literal["active", "revoked"]
UsageStatus = Literal["billed", "needs_review", "void", "byok", "pending"]
Period = Literal["day", "month", "total"]


class Paged(TypedDict, Generic[Item]):
    """A page of a list, newest first; `next_cursor` asks for the next, null on the last."""

    data: list[Item]
    next_cursor: str | None


class Money(TypedDict):
    """An amount, exactly: in credits and in US dollars."""

    credits: str
    usd: str


class Cost(TypedDict):
    """What a provider takes, in US dollars and in whole picos of them."""

    usd: str
    picos: str


class Balance(TypedDict):
    """`available` is posted less held, plus the credit limit."""

    posted: Money
    held: Money
    available: Money


class ExpiringCredits(Money):
    """Part of what is posted, and when what is left of it is gone."""

    expires_at: datetime


class AccountBalance(Balance):
    """A balance with how far it may go below zero, and what of it expires, the first first."""

    credit_limit: Money
    expiring: list[ExpiringCredits]


class Account(TypedDict):
    """An account with its balance."""

    id: UUID
    name: str
    tier: str
    status: AccountStatus
    replay_retries: bool
    created_at: datetime
    balance: Balance
    credit_limit: Money


class AccountDetail(Account):
    """An account with its keys, the terms that hold for it alone, and when it was last busy.

    `status_reason` says why it was suspended or closed, `last_request_at` when its newest request
    began.
    """

    status_reason: str | None
    overrides: dict[str, object]
    active_keys: int
    all_keys: int
    last_request_at: datetime | None


class Granted(TypedDict):
    """A grant's ledger entry, and the balance after it."""

    entry_id: UUID
    balance: Balance


class KeyBudget(Money):
    """What a key or a project may spend in a period; days and months are those of UTC."""

    period: Period


class Key(TypedDict):
    """A virtual key, without its secret; null is no limit.

    `last_used_at` is accurate to some seconds, `replaced_by` the key that it was rotated to.
    """

    id: UUID
    name: str
    prefix: str
    status: KeyStatus
    role: Literal["inference", "read-only", "manage"]
    project_id: UUID | None
    created_at: datetime
    last_used_at: datetime | None
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: UUID | None
    allowed_models: list[str] | None
    allowed_endpoints: list[str] | None
    allowed_networks: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    budget: KeyBudget | None
    budget_left: Money | None


class AccountKey(Key):
    """A key in a list of all accounts' keys."""

    account_id: UUID


class NewKey(Key):
    """A key that was just made; `key` is the secret, and is shown this once."""

    account_id: UUID
    key: str


class Project(TypedDict):
    """A project of an account; null is no budget."""

    id: UUID
    name: str
    status: Literal["active", "archived"]
    created_at: datetime
    archived_at: datetime | None
    budget: KeyBudget | None
    budget_left: Money | None


class Counts(TypedDict):
    """What a request used; null is not known, or does not apply."""

    input_tokens: int | None
    cached_input_tokens: int | None
    cache_creation_tokens: int | None
    cache_creation_1h_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    audio_input_tokens: int | None
    audio_output_tokens: int | None
    image_input_tokens: int | None
    image_output_tokens: int | None
    images: int | None
    input_characters: int | None
    audio_ms: int | None
    queries: int | None


class Usage(TypedDict):
    """A request as its customer sees it; the price is null while there is none.

    `quantity` is how many of a metered action, which `model` names; null for calls of models.
    """

    request_id: UUID
    key_id: UUID
    project_id: UUID | None
    created_at: datetime
    endpoint: str
    model: str
    status: UsageStatus
    usage: Counts
    quantity: int | None
    price: Money | None


class AdminUsage(Usage):
    """A request as the operator sees it, with both sides of its money."""

    account_id: UUID
    tier: str
    streamed: bool
    byok: bool
    model_answered: str | None
    settled_at: datetime | None
    cost: Cost | None
    cost_source: str | None
    rated_cost: Cost | None
    witness_cost: Cost | None
    attempts: int | None
    answer_id: str | None
    service_tier: str | None
    markup: str | None
    rule: str | None
    price_version: int
    hold: Money
    overdraft: Money
    review_reason: str | None
    resolution: Literal["charge", "waive", "reprice"] | None
    resolved_at: datetime | None
    error_code: str | None
    upstream_status: int | None
    client_gone: bool
    first_byte_ms: int | None
    duration_ms: int | None


class PriceLine(TypedDict):
    """An addend of a price, in US dollars; `quantity` of what, says the label."""

    label: str
    quantity: int | None
    usd: str


class ReceiptEntry(TypedDict):
    """A ledger entry of the receipt's request."""

    seq: int
    kind: str
    amount: Money
    created_at: datetime


class Receipt(Usage):
    """A request with everything that made its price; the lines add up to it."""

    model_answered: str | None
    streamed: bool
    service_tier: str | None
    settled_at: datetime | None
    first_byte_ms: int | None
    duration_ms: int | None
    error_code: str | None
    review_reason: str | None
    rule: str | None
    price_version: int
    lines: list[PriceLine] | None
    hold: Money
    captured: Money | None
    refunded: Money
    entries: list[ReceiptEntry]


class TokenEstimate(TypedDict):
    """The most that there may be, and a guess."""

    ceiling: int
    likely: int


class TokenEstimates(TypedDict):
    """Estimates of both directions."""

    input: TokenEstimate
    output: TokenEstimate


class Estimate(TypedDict):
    """What a call would cost, before it is made; nothing is held or charged for the answer."""

    endpoint: str
    model: str
    byok: bool
    admitted: bool
    ceiling: Money
    likely: Money | None
    available: Money
    budget_left: Money | None
    tokens: TokenEstimates
    affordable: dict[str, int | None] | None
    clamped_to: int | None
    rule: str
    price_version: int


class Entry(TypedDict):
    """A ledger entry as its customer sees it: of a request, or of money with an id of its own."""

    seq: int
    created_at: datetime
    kind: str
    request_id: UUID | None
    entry_id: UUID | None
    amount: Money
    posted_change: Money
    held_change: Money
    posted_after: Money
    held_after: Money
    reference: str | None


class AdminEntry(Entry):
    """A ledger entry as the operator sees it: the reason is a note to themselves."""

    reason: str | None


class ReviewCount(TypedDict):
    """How many requests wait for an operator for one reason, and what was held for them."""

    reason: str
    charged: bool
    requests: int
    oldest_at: datetime
    held: Money


class ReviewCounts(TypedDict):
    """The review queue by reason; the most frequent first."""

    data: list[ReviewCount]


class PriceBook(TypedDict):
    """A version of the price book; the document is what `config.yaml` has as `price_book`.

    One that is `overtaken` never comes into force: what was published after it begins earlier.
    """

    version: int
    state: Literal["in_force", "scheduled", "overtaken", "cancelled", "past"]
    valid_from: datetime
    published_by: str
    credit_usd: str
    document: dict[str, object]


class AuditEvent(TypedDict):
    """An act of an operator; amounts in its detail are integers of nano-USD."""

    id: UUID
    created_at: datetime
    actor: str
    action: str
    account_id: UUID | None
    detail: dict[str, object]


class Liveness(TypedDict):
    """That the process answers."""

    status: Literal["alive"]


class SpoolState(TypedDict):
    """What waits in the spool: bytes to be settled, and settlements that need a human."""

    bytes: int
    rejected: int


class Readiness(TypedDict):
    """What is up; for each that is down, what to look at."""

    status: Literal["ready", "not_ready"]
    down: dict[str, str]
    checks: dict[str, Literal["ok", "down"]]
    spool: SpoolState


class ErrorDetail(TypedDict):
    """What went wrong, and in `message` what to do; some codes come with more members."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    message: str
    type: str
    param: str | None
    code: str


class Error(TypedDict):
    """An error, in OpenAI's shape."""

    error: ErrorDetail


class AnthropicError(TypedDict):
    """An error, in Anthropic's shape."""

    type: Literal["error"]
    error: ErrorDetail
    request_id: UUID
