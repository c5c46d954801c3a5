"""The planes of the service: whose operations, behind which authentication, for which roles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route

from proxy.accounts import ROLES as KEY_ROLES
from proxy.api.account import AccountApi
from proxy.api.admin import AdminApi
from proxy.api.operations import Operation
from proxy.api.ops import Ops
from proxy.api.services import Services
from proxy.operators import ROLES as OPERATOR_ROLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Operations that share their authentication.

    `schemes` are names of security schemes, any of which will do; `roles` maps each role to what
    it may, and is empty where there are none.
    """

    name: str
    summary: str
    operations: Sequence[Operation[Any]]
    routes: Sequence[Route]
    schemes: tuple[str, ...]
    roles: Mapping[str, frozenset[str]]


def planes_of(services: Services) -> list[Plane]:
    """Every plane that is made of operations; the data plane and the witness's path are not."""
    account, admin, ops = AccountApi(services), AdminApi(services), Ops(services)
    return [
        Plane(
            name="account",
            summary="What a customer sees and does of the own account, by any of its virtual keys.",
            operations=account.operations(),
            routes=account.routes(),
            schemes=("virtualKey", "virtualKeyHeader"),
            roles=KEY_ROLES,
        ),
        Plane(
            name="admin",
            summary="What operators sell, limit, see and correct, by an admin key.",
            operations=admin.operations(),
            routes=admin.routes(),
            schemes=("adminKey",),
            roles=OPERATOR_ROLES,
        ),
        Plane(
            name="ops",
            summary="What orchestrators and Prometheus look at: open on loopback, else by a token.",
            operations=ops.operations(),
            routes=ops.routes(),
            schemes=("opsToken",),
            roles={},
        ),
    ]
