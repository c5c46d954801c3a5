"""Accounts as operators see them: made, listed, changed, and given credits."""

from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from pricing.money import MAX_AMOUNT
from proxy.api.admin_lookup import ACCOUNT_FILTERS, account_filter
from proxy.api.answers import Account, AccountBalance, AccountDetail, Granted, Paged
from proxy.api.bodies import AccountOptions, Grant, NewAccount, nanos_of, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN, ADMIN_ACCOUNT, account_in, no_account
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError
from proxy.ids import uuid7
from proxy.ledger import Funded
from proxy.operators import Operator

# The same as the command line's, so that a reference counts once, whichever way it comes.
_GRANT_SOURCE = "admin"


class AdminAccounts:
    """Endpoints on accounts and their balances."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._directory = services.directory
        self._ledger = services.ledger
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit
        self._tiers = services.tiers
        self._credits = services.expiring_credits

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/accounts",
                handler=self._list,
                needs="read",
                tag="accounts",
                summary=(
                    "List accounts with their balances; a page of a search may be short, even "
                    "empty, and yet not the last"
                ),
                answers=Paged[Account],
                query=(*PAGED_BY_UUID, *ACCOUNT_FILTERS),
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
                summary="Read an account, and what there is to know of it",
                answers=AccountDetail,
            ),
            Operation(
                method="PATCH",
                path=ADMIN_ACCOUNT,
                handler=self._change,
                needs="support",
                tag="accounts",
                summary="Change an account's name, and how it is served",
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
        wanted = account_filter(request, self._nanos_per_credit)
        found = await self._directory.search(wanted, before=page.before, limit=page.limit)
        shown = page.show(found.rows, "account_id", self._shapes.account)
        return answer(page.go_on(shown, found.goes_on_before))

    async def _create(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), NewAccount)
        tier = self._tiers.default if body.tier is None else body.tier
        self._tiers.check(tier)
        account_id = await self._accounts.create_account(
            name=body.name,
            tier=tier,
            credit_limit_nanos=nanos_of(
                body.credit_limit, self._nanos_per_credit, param="credit_limit", minimum=0
            ),
            actor=operator.name,
            starter_nanos=self._tiers.of(tier, {}).starter_nanos,
            monthly_nanos=self._tiers.monthly_nanos,
        )
        return answer(self._shapes.account(await self._row(account_id)), 201)

    async def _show(self, request: Request, _operator: Operator) -> Response:
        row = await account_in(request, self._accounts)
        detail = await self._directory.detail(row["account_id"])
        return answer(self._shapes.account_detail(row, detail or {}))

    async def _change(self, request: Request, operator: Operator) -> Response:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        body = await read_body(exchange_of(request), AccountOptions)
        if body.name is not None:
            await self._directory.rename(account_id, body.name, actor=operator.name)
        if body.replay_retries is not None:
            await self._accounts.set_options(
                account_id, replay_retries=body.replay_retries, actor=operator.name
            )
        return answer(self._shapes.account(await self._row(account_id)))

    async def _balance(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        found = await self._credits.balance(account["account_id"])
        if found is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account["account_id"]))
        balance, expiring = found
        shown: AccountBalance = {
            **self._shapes.balance(balance),
            "credit_limit": self._shapes.money(balance.credit_limit),
            "expiring": [self._shapes.expiring(part) for part in expiring],
        }
        return answer(shown)

    async def _grant(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), Grant)
        amount = nanos_of(body.credits, self._nanos_per_credit, param="credits")
        if account["posted"] + account["credit_limit"] + amount > MAX_AMOUNT:
            message = "The account can't hold that much. Grant less."
            raise InvalidRequestError(message, param="credits")
        done = await self._post(account["account_id"], body, amount, operator)
        if done.balance is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account["account_id"]))
        if done.outcome == "conflict":
            message = (
                f"The reference {body.reference!r} was used for another grant on this account. "
                "Use a new reference for a new grant."
            )
            raise ConflictError(message, param="reference")
        return answer(
            {"entry_id": done.entry_id, "balance": self._shapes.balance(done.balance)}, 201
        )

    async def _post(
        self, account_id: UUID, body: Grant, amount_nanos: int, operator: Operator
    ) -> Funded:
        if body.expires_at is not None:
            return await self._credits.grant(
                account_id,
                uuid7(),
                amount_nanos=amount_nanos,
                source=_GRANT_SOURCE,
                external_id=body.reference,
                reason=body.reason,
                actor=operator.name,
                expires_at=body.expires_at,
            )
        return await self._ledger.fund(
            account_id,
            uuid7(),
            kind="grant",
            amount_nanos=amount_nanos,
            source=_GRANT_SOURCE,
            external_id=body.reference,
            reason=body.reason,
            actor=operator.name,
        )

    async def _row(self, account_id: UUID) -> dict[str, Any]:
        row = await self._accounts.account(account_id)
        if row is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account_id))
        return row
