"""The bodies that make and change keys and projects."""

from fnmatch import fnmatchcase
from ipaddress import ip_network
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, Field

from proxy.api.bodies import Body, Budget, Count, Name, Text, TimeToCome, nanos_of
from proxy.endpoints import ENDPOINTS
from proxy.keys import KeySettings

Role = Literal["inference", "read-only", "manage"]
_MAX_INT64 = 2**63 - 1
_MAX_OVERLAP_S = 7 * 86_400


def _network(text: str) -> str:
    # An IPv6 address may name an interface of the machine that it is written on: not of ours.
    if "%" in text:
        msg = "must be a network such as 192.0.2.0/24 or 2001:db8::/32"
        raise ValueError(msg)
    return str(ip_network(text))


def _endpoint(text: str) -> str:
    if not any(fnmatchcase(name, text) for name in _ENDPOINTS):
        msg = f"matches no endpoint; there are {', '.join(_ENDPOINTS)}"
        raise ValueError(msg)
    return text


# What a key can be used for: the metered endpoints, and charges for actions.
_ENDPOINTS = (*dict.fromkeys(endpoint.name for endpoint in ENDPOINTS.values()), "charges")
_Model = Annotated[Text, Field(min_length=1, max_length=256)]
_Endpoint = Annotated[
    str,
    Field(
        min_length=1,
        max_length=64,
        pattern=r"^[a-z0-9._*?-]+$",
        json_schema_extra={"examples": ["chat.completions", "audio.*"]},
    ),
    AfterValidator(_endpoint),
]
_Network = Annotated[
    str,
    AfterValidator(_network),
    Field(max_length=64, json_schema_extra={"examples": ["192.0.2.0/24", "2001:db8::/32"]}),
]


class _KeySettings(Body):
    """What a key may be limited to; null is no limit."""

    project_id: UUID | None = None
    expires_at: TimeToCome | None = None
    allowed_models: Annotated[list[_Model], Field(min_length=1, max_length=200)] | None = None
    allowed_endpoints: Annotated[list[_Endpoint], Field(min_length=1, max_length=50)] | None = None
    allowed_networks: Annotated[list[_Network], Field(min_length=1, max_length=100)] | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=_MAX_INT64)] | None = None
    max_concurrency: Count | None = None
    budget: Budget | None = None


class KeyBody(_KeySettings):
    """POST …/keys. What is left out is not limited."""

    name: Name
    role: Role = "inference"

    def settings(self, nanos_per_credit: int) -> KeySettings:
        """What the key is to be; InvalidRequestError for a budget that is no amount."""
        members = {**self.model_dump(exclude={"name"}), **budget_columns(self, nanos_per_credit)}
        return KeySettings(**members)


class KeyChanges(_KeySettings):
    """PATCH …/keys/{key_id}: what is left out stays as it is, null takes a limit away."""

    name: Name = Field(default_factory=str)
    role: Role = Field(default_factory=lambda: "inference")

    def columns(self, nanos_per_credit: int) -> dict[str, Any]:
        """What is to be changed; InvalidRequestError for a budget that is no amount."""
        return _columns(self, nanos_per_credit)


class KeyRotation(Body):
    """POST …/keys/{key_id}/rotate. The old key works for so long beside the new one."""

    overlap_s: Annotated[int, Field(ge=0, le=_MAX_OVERLAP_S)] = 0


class ProjectBody(Body):
    """POST …/projects. The budget is that of all the project's keys together."""

    name: Name
    budget: Budget | None = None


class ProjectChanges(Body):
    """PATCH …/projects/{project_id}: what is left out stays; null takes the budget away."""

    name: Name = Field(default_factory=str)
    budget: Budget | None = None

    def columns(self, nanos_per_credit: int) -> dict[str, Any]:
        """What is to be changed; InvalidRequestError for a budget that is no amount."""
        return _columns(self, nanos_per_credit)


def budget_columns(
    body: _KeySettings | ProjectBody | ProjectChanges, nanos_per_credit: int
) -> dict[str, Any]:
    """How a budget is stored: in nano-USD, and its period."""
    budget = body.budget
    if budget is None:
        return {"budget": None, "budget_period": "total"}
    return {
        "budget": nanos_of(budget.credits, nanos_per_credit, param="budget.credits"),
        "budget_period": budget.period,
    }


def _columns(body: KeyChanges | ProjectChanges, nanos_per_credit: int) -> dict[str, Any]:
    columns = body.model_dump(exclude_unset=True)
    if "budget" in columns:
        columns |= budget_columns(body, nanos_per_credit)
    return columns
