"""Keys of all accounts, for whoever has to find whose a key is."""

import re

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import AccountKey, Paged
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer
from proxy.errors import InvalidRequestError
from proxy.keys import SHOWN_CHARACTERS
from proxy.operators import Operator

_STATUSES = ("active", "revoked")
_PREFIX = Parameter(
    name="prefix",
    # No more of a key belongs into an address, which is written to logs.
    schema={"type": "string", "pattern": f"^[A-Za-z0-9_-]{{1,{SHOWN_CHARACTERS}}}$"},
    summary=f"Only keys that begin so: at most the first {SHOWN_CHARACTERS} characters.",
)
_STATUS = Parameter(
    name="status",
    schema={"type": "string", "enum": list(_STATUSES)},
    summary="Only keys of this status; those that have expired count as active.",
)


class KeyOversight:
    """The oversight of keys."""

    def __init__(self, services: Services) -> None:
        self._keys = services.keys
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Operator]]:
        """Its one endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/keys",
                handler=self._list,
                needs="read",
                tag="keys",
                summary="List the keys of all accounts",
                answers=Paged[AccountKey],
                query=(*PAGED_BY_UUID, _PREFIX, _STATUS),
            )
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        prefix, status = (request.query_params.get(each.name) for each in (_PREFIX, _STATUS))
        if prefix is not None and not re.fullmatch(str(_PREFIX.schema["pattern"]), prefix):
            message = f"prefix must be at most the first {SHOWN_CHARACTERS} characters of a key."
            raise InvalidRequestError(message, param="prefix")
        if status is not None and status not in _STATUSES:
            raise InvalidRequestError("status must be active or revoked.", param="status")
        rows = await self._keys.keys_of_all(
            prefix=prefix, status=status, before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "key_id", self._shapes.account_key))
