"""The service keeps to its own OpenAPI document, whatever is sent to it.

Every operation of the document is tried with what it asks for, and then with what schemathesis
makes of it: values that it allows, and values that it does not. No answer may be a server error,
have a status or a type that is not declared, or a body that is not as declared.
"""
# Its types leave their parameters open.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, CheckFunction, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.conftest import House
from tests.support.calls import CALLS
from tests.support.estate import PRICE_BOOK, Estate, make_estate
from tests.support.examples import example_of
from tests.support.service import ADMIN_KEY, NO_TLS

Operation = APIOperation[Any, Any, Any, Any]

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
_STORED = "/v1/responses/{response_id}"
# Operations whose example is refused, because it needs what no example can have.
REFUSED = {
    "DELETE /admin/v1/markups": "there is a rule for the model to be removed",
    "POST /admin/v1/accounts/{account_id}/erase": "the account is closed",
}
# How many requests are made of an operation that it allows, and how many that it does not.
EXAMPLES = 6
PLANES = {
    "account": "^/api/v1/",
    "admin": "^/admin/v1/",
    "data": "^/v1/",
    "ops": "^/[a-z.]+$",
}


class Breach(NamedTuple):
    """Where the service did not keep to the document."""

    kind: str
    text: str


@dataclass
class Contract:
    """The document of a running service, and what calls need."""

    house: House
    raw: dict[str, Any]
    schema: Any
    session: requests.Session
    stack: ExitStack

    def estate(self) -> Estate:
        """Make a customer with rows of every kind, whose requests are sent over the network."""
        estate = asyncio.run(make_estate(self.house.database_url, self.call))
        self.stack.callback(estate.money.connection.close)
        return estate

    async def call(self, method: str, path: str, *, key: str, **request: Any) -> httpx.Response:
        """Send a request as an estate does."""
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(
            base_url=self.house.service.base_url, headers=headers, verify=NO_TLS, timeout=60
        ) as client:
            return await client.request(method, path, **request)

    def breaches(self, operation: Operation, estate: Estate, key: str) -> Iterator[str]:
        """Say where an operation does not keep to the document."""
        ids = self._ids(operation, estate)
        breaches = [*self._try_example(operation, ids, key)]
        for mode in GenerationMode:
            breaches += self._try_generated(operation, mode, ids, key)
        # The first of each kind tells enough.
        yield from {breach.kind: breach.text for breach in reversed(breaches)}.values()

    def _ids(self, operation: Operation, estate: Estate) -> dict[str, str]:
        if not operation.path.startswith("/v1/"):
            asyncio.run(estate.path(operation.path))
        return {"model": "priced", **estate.ids}

    def _try_example(self, operation: Operation, ids: dict[str, str], key: str) -> Iterator[Breach]:
        """Send what is asked for: that must succeed."""
        request: dict[str, Any] = {"path_parameters": ids}
        described = self.raw["paths"][operation.path][operation.method.lower()]
        content = described.get("requestBody", {}).get("content", {})
        if "multipart/form-data" in content or operation.path in {*CALLS, _STORED}:
            return  # those calls have tests of their own, with a provider behind them
        if "application/json" in content:
            schema = content["application/json"]["schema"]
            request["body"] = example_of(schema, self.raw, ids)
            request["media_type"] = "application/json"
        case = operation.Case(**request)
        answer = self._send(case, key)
        if not 200 <= answer.status_code < 300 and operation.label not in REFUSED:
            text = f"{operation.label}: the example answers {answer.status_code}: {answer.text}"
            yield Breach("refused", text)
        yield from self._judge(case, answer)

    def _try_generated(
        self, operation: Operation, mode: GenerationMode, ids: dict[str, str], key: str
    ) -> list[Breach]:
        found: list[Breach] = []

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Case[Operation]) -> None:
            if mode is GenerationMode.POSITIVE:
                case.path_parameters |= {n: ids[n] for n in case.path_parameters if n in ids}
            found.extend(self._judge(case, self._send(case, key)))

        # Of an operation that takes nothing there is nothing to get wrong.
        with contextlib.suppress(Unsatisfiable):
            run()
        return found

    def _send(self, case: Case[Operation], key: str) -> schemathesis.Response:
        headers = {"authorization": f"Bearer {key}"}
        return case.call(
            base_url=self.house.service.base_url, session=self.session, headers=headers
        )

    def _judge(self, case: Case[Operation], answer: schemathesis.Response) -> Iterator[Breach]:
        try:
            case.validate_response(answer, checks=CHECKS)
        except FailureGroup as failures:
            for failure in failures.exceptions:
                text = f"{case.operation.label}: {failure}\n{answer.text[:500]}"
                yield Breach(type(failure).__name__, text)


@pytest.fixture(scope="module")
def contract(make_house: Callable[..., House]) -> Iterator[Contract]:
    """The document as it is served, which is open to all, by a service that limits no caller."""
    limits = ("ACCOUNT_PER_MINUTE", "ADMIN_PER_MINUTE", "FAILURES_PER_MINUTE")
    house = make_house(environ={f"TALLYGATE_API_LIMITS__{each}": "1000000" for each in limits})
    answer = httpx.get(house.service.base_url + "/openapi.json", verify=NO_TLS)
    assert answer.status_code == 200
    schema = schemathesis.openapi.from_dict(answer.json())
    with requests.Session() as session, ExitStack() as stack:
        session.trust_env = False
        made = Contract(house, answer.json(), schema, session, stack)
        drafts = "/admin/v1/price-books/drafts"
        draft = house.service.admin("POST", drafts, {"name": "priced", "document": PRICE_BOOK})
        house.service.admin("POST", f"{drafts}/{draft['id']}/publish", {})
        yield made


@pytest.mark.parametrize("plane", PLANES)
def test_service_keeps_to_its_document(contract: Contract, plane: str) -> None:

    found: list[str] = []
    shared = contract.estate()
    for result in contract.schema.include(path_regex=PLANES[plane]).get_all_operations():
        operation: Operation = result.ok()
        # What an operation changes is no other's.
        estate = shared if operation.method.upper() == "GET" else contract.estate()
        key = ADMIN_KEY if plane == "admin" else estate.key
        found += contract.breaches(operation, estate, key)
    log = contract.house.service.log()[-3000:] if found else ""
    assert not found, "\n\n".join([*found, log])
