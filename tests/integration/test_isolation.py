"""Nobody sees or changes what is another's, over every endpoint that there is.

The endpoints are those of the service's own list, so a new one can't be forgotten: its paths'
parameters must be known to `tests/support/estate.py`.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from proxy.accounts import ROLES as KEY_ROLES
from proxy.api.openapi import OpenApi, path_names
from proxy.api.operations import Operation
from proxy.api.planes import Plane, planes_of
from proxy.api.routes import make_application
from proxy.operators import ROLES as OPERATOR_ROLES
from tests.support.api import Api, no_lifespan
from tests.support.estate import CREDIT, PRICE_BOOK, WORDS, Estate, make_estate
from tests.support.examples import example_of
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

HIDDEN = {403, 404}


@dataclass
class World:
    """The service's operations, its document, and two customers on it."""

    api: Api
    url: str
    planes: dict[str, Plane]
    document: dict[str, Any]
    stack: ExitStack
    sent: int = 0
    alice: Estate = field(init=False)
    bob: Estate = field(init=False)

    async def send(
        self, operation: Operation[Any], key: str | None, things: Estate, **request: Any
    ) -> httpx.Response:
        """Send an operation with the ids of somebody's things, in path and body."""
        path = await things.path(operation.path)
        if operation.body is not None:
            described = self.document["paths"][operation.path][operation.method.lower()]
            content = described["requestBody"]["content"]["application/json"]
            request.setdefault("json", example_of(content["schema"], self.document, things.ids))
        # Each from another address: whoever sends many wrong keys is not listened to for a while.
        self.sent += 1
        host = f"10.0.{self.sent // 250}.{self.sent % 250}"
        return await self.api.on(host).call(operation.method, path, key=key, **request)

    async def estate(self) -> Estate:
        """Make another customer."""
        estate = await make_estate(self.url, self.api.call)
        self.stack.callback(estate.money.connection.close)
        return estate


@pytest.fixture
async def world(api: Api, database_url: str) -> AsyncIterator[World]:
    """Two customers with rows of every kind."""
    planes = planes_of(api.services)
    document = OpenApi(planes).document()
    with ExitStack() as stack:
        made = World(api, database_url, {plane.name: plane for plane in planes}, document, stack)
        books = api.services.price_books
        await books.publish(PRICE_BOOK, nanos_per_credit=CREDIT, actor="test")
        await books.refresh()
        made.alice, made.bob = await made.estate(), await made.estate()
        yield made


def label(operation: Operation[Any]) -> str:
    return f"{operation.method} {operation.path}"


async def test_customer_reaches_nothing_by_the_ids_of_another(world: World) -> None:
    """With the own ids the same requests work, so that it is the ids that make the difference."""
    for operation in world.planes["account"].operations:
        if not set(path_names(operation.path)) - WORDS:
            continue
        carol = await world.estate()
        own = await world.send(operation, carol.key, carol)
        assert own.is_success, f"{label(operation)}: {own.status_code} {own.text}"
        await world.alice.path(operation.path)
        before = world.alice.rows()
        answer = await world.send(operation, world.bob.key, world.alice)
        assert answer.status_code in HIDDEN, f"{label(operation)}: {answer.status_code}"
        assert world.alice.rows() == before, label(operation)
        assert_hidden(world, operation, answer)


async def test_customer_is_shown_own_rows_only(world: World) -> None:
    """Whatever the query asks for."""
    await make_all_things(world)
    for operation in world.planes["account"].operations:
        if operation.method != "GET" or set(path_names(operation.path)) - WORDS:
            continue
        answer = await world.send(operation, world.bob.key, world.bob)
        assert answer.is_success, f"{label(operation)}: {answer.status_code} {answer.text}"
        assert_hidden(world, operation, answer)
        if answer.text.startswith('{"data":'):
            assert answer.json()["data"], f"{label(operation)} shows nothing of the own account"
        for parameter in operation.query:
            if parameter.name.endswith("_id") or parameter.name == "cursor":
                asked = world.alice.ids.get(parameter.name, world.alice.ids["request_id"])
                answer = await world.send(
                    operation, world.bob.key, world.bob, params={parameter.name: asked}
                )
                assert_hidden(world, operation, answer, besides=asked)


async def test_customer_can_not_name_the_things_of_another_in_a_body(world: World) -> None:
    await make_all_things(world)
    for operation in world.planes["account"].operations:
        described = world.document["paths"][operation.path][operation.method.lower()]
        if operation.body is None:
            continue
        content = described["requestBody"]["content"]["application/json"]
        for name in set(operation.body.model_fields) & set(world.alice.ids):
            example = example_of(content["schema"], world.document, world.bob.ids)
            body = {**example, name: world.alice.ids[name]}
            before = world.alice.rows()
            answer = await world.send(operation, world.bob.key, world.bob, json=body)
            assert 400 <= answer.status_code < 500, f"{label(operation)} takes another's {name}"
            assert world.alice.rows() == before, label(operation)
            assert_hidden(world, operation, answer, besides=world.alice.ids[name])


async def test_key_does_what_its_role_is_good_for_and_no_more(world: World) -> None:
    for operation in world.planes["account"].operations:
        for role, allowed in KEY_ROLES.items():
            if operation.needs in allowed:
                continue
            await world.alice.path(operation.path)
            before = world.alice.rows()
            answer = await world.send(operation, world.alice.keys[role], world.alice)
            assert answer.status_code == 403, f"{label(operation)} by {role}"
            assert answer.json()["error"]["code"] == "permission_denied"
            assert world.alice.rows() == before, label(operation)


async def test_nothing_is_answered_without_a_key(world: World) -> None:
    for name in ("account", "admin"):
        for operation in world.planes[name].operations:
            for key in (None, "sk-nobodys", "nobodys"):
                answer = await world.send(operation, key, world.alice)
                assert answer.status_code in {401, 403}, f"{label(operation)} with {key}"


async def test_admin_api_refuses_every_virtual_key_and_the_account_api_admin_keys(
    world: World,
) -> None:
    for operation in world.planes["admin"].operations:
        for role in KEY_ROLES:
            answer = await world.send(operation, world.alice.keys[role], world.alice)
            assert answer.status_code == 403, f"{label(operation)} by a key of {role}"
    for operation in world.planes["account"].operations:
        answer = await world.send(operation, ADMIN_KEY, world.alice)
        assert answer.status_code in {401, 403}, label(operation)


async def test_operator_does_what_the_role_is_good_for_and_no_more(world: World) -> None:
    keys = {
        role: (await world.api.admin("POST", "/admin-keys", {"name": role, "role": role}))["key"]
        for role in OPERATOR_ROLES
    }
    for operation in world.planes["admin"].operations:
        for role, allowed in OPERATOR_ROLES.items():
            if operation.needs in allowed:
                continue
            await world.alice.path(operation.path)
            before = world.alice.rows()
            answer = await world.send(operation, keys[role], world.alice)
            assert answer.status_code == 403, f"{label(operation)} by {role}"
            assert answer.json()["error"]["code"] == "permission_denied"
            assert world.alice.rows() == before, label(operation)


async def test_every_operation_needs_what_some_role_is_good_for(world: World) -> None:
    """Else nobody could do it."""
    for name in ("account", "admin"):
        plane = world.planes[name]
        for operation in plane.operations:
            assert any(operation.needs in allowed for allowed in plane.roles.values()), label(
                operation
            )


async def test_every_path_of_the_apis_is_an_operation_and_documented(world: World) -> None:
    operations = {
        (operation.method, operation.path)
        for plane in world.planes.values()
        for operation in plane.operations
    }
    documented = {
        (method.upper(), path)
        for path, methods in world.document["paths"].items()
        for method in methods
    }
    routed = {
        (method, route.path)
        for route in make_application(world.api.services, no_lifespan).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
        if route.path.startswith(("/api/", "/admin/"))
    }
    assert routed <= operations <= documented


async def make_all_things(world: World) -> None:
    """Have both customers own one of everything that paths have a name for."""
    for operation in world.planes["account"].operations:
        for estate in (world.alice, world.bob):
            await estate.path(operation.path)


def assert_hidden(
    world: World, operation: Operation[Any], answer: httpx.Response, *, besides: str = ""
) -> None:
    """Nothing of the other customer stands in an answer but what was sent."""
    shown = {mark for mark in world.alice.marks() if mark in answer.text}
    sent = {besides, *world.alice.ids.values()} if answer.is_client_error else {besides}
    assert shown <= sent | world.bob.marks(), f"{label(operation)} shows {shown}"
