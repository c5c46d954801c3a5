"""Accounts as operators see them: made, listed, changed, and given credits."""

from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from pricing.money import MAX_AMOUNT
from proxy.api.answers import Account, AccountBalance, Granted, Paged
from proxy.api.bodies import AccountOptions, Grant, NewAccount, nanos_of, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN, ADMIN_ACCOUNT, account_in, no_account
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError
from proxy.ids import uuid7
from proxy.operators import Operator

# The same as the command line's, so that a reference counts once, whichever way it comes.
_GRANT_SOURCE = "admin"


class AdminAccounts:
    """Endpoints on accounts and their balances."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit
        self._default_tier = services.default_tier

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/accounts",
                handler=self._list,
                needs="read",
                tag="accounts",
                summary="List accounts with their balances",
                answers=Paged[Account],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=ADMIN + "/accounts",
                handler=self._create,
                needs="support",
                tag="accounts",
                summary="Create an account",
                body=NewAccount,
                answers=Account,
                status=201,
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT,
                handler=self._show,
                needs="read",
                tag="accounts",
                summary="Read an account",
                answers=Account,
            ),
            Operation(
                method="PATCH",
                path=ADMIN_ACCOUNT,
                handler=self._change,
                needs="support",
                tag="accounts",
                summary="Change how an account is served",
                body=AccountOptions,
                answers=Account,
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/balance",
                handler=self._balance,
                needs="read",
                tag="accounts",
                summary="Read an account's balance",
                answers=AccountBalance,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/grants",
                handler=self._grant,
                needs="finance",
                tag="accounts",
                summary="Grant credits, once for each reference",
                body=Grant,
                answers=Granted,
                status=201,
            ),
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._accounts.accounts(before=page.before, limit=page.limit)
        return answer(page.show(rows, "account_id", self._shapes.account))

    async def _create(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), NewAccount)
        account_id = await self._accounts.create_account(
            name=body.name,
            tier=self._default_tier if body.tier is None else body.tier,
            credit_limit_nanos=nanos_of(
                body.credit_limit, self._nanos_per_credit, param="credit_limit", minimum=0
            ),
            actor=operator.name,
        )
        return answer(self._shapes.account(await self._row(account_id)), 201)

    async def _show(self, request: Request, _operator: Operator) -> Response:
        return answer(self._shapes.account(await account_in(request, self._accounts)))

    async def _change(self, request: Request, operator: Operator) -> Response:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        body = await read_body(exchange_of(request), AccountOptions)
        await self._accounts.set_options(
            account_id, replay_retries=body.replay_retries, actor=operator.name
        )
        return answer(self._shapes.account(await self._row(account_id)))

    async def _balance(self, request: Request, _operator: Operator) -> Response:
        account = self._shapes.account(await account_in(request, self._accounts))
        return answer({**account["balance"], "credit_limit": account["credit_limit"]})

    async def _grant(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), Grant)
        amount = nanos_of(body.credits, self._nanos_per_credit, param="credits")
        if account["posted"] + account["credit_limit"] + amount > MAX_AMOUNT:
            message = "The account can't hold that much. Grant less."
            raise InvalidRequestError(message, param="credits")
        done = await self._ledger.fund(
            account["account_id"],
            uuid7(),
            kind="grant",
            amount_nanos=amount,
            source=_GRANT_SOURCE,
            external_id=body.reference,
            reason=body.reason,
            actor=operator.name,
        )
        if done.balance is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account["account_id"]))
        if done.outcome == "conflict":
            message = (
                f"The reference {body.reference!r} was used for another amount on this account. "
                "Use a new reference for a new grant."
            )
            raise ConflictError(message, param="reference")
        return answer(
            {"entry_id": done.entry_id, "balance": self._shapes.balance(done.balance)}, 201
        )

    async def _row(self, account_id: UUID) -> dict[str, Any]:
        row = await self._accounts.account(account_id)
        if row is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account_id))
        return row
