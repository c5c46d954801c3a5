"""The models that are offered, and switching them off and on: at once, on every replica."""

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from proxy.api.bodies import Body, Text, read_body
from proxy.api.operations import Operation
from proxy.api.paths import ADMIN, uuid_in
from proxy.api.services import Services
from proxy.api.shapes import utc
from proxy.api.web import answer, exchange_of
from proxy.catalog import Model
from proxy.errors import NotFoundError
from proxy.operators import Operator
from proxy.switches import Switch

_SWITCHES = ADMIN + "/model-switches"
_Pattern = Annotated[Text, Field(min_length=1, max_length=256)]


class SwitchBody(Body):
    """POST /admin/v1/model-switches: what to switch off, `model` (or a pattern) or `provider`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "gpt-4o*", "reason": "the provider is down"}]}
    )

    model: _Pattern | None = None
    provider: _Pattern | None = None
    reason: Annotated[Text, Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.model is None) == (self.provider is None):
            msg = "send either model or provider"
            raise ValueError(msg)
        return self


class ModelSwitch(TypedDict):
    """What is off: models of a name or pattern, or all of a provider; the other is null."""

    id: UUID
    model: str | None
    provider: str | None
    reason: str
    switched_by: str
    switched_at: datetime


class OfferedModel(TypedDict):
    """A model; `switch_id` is the switch that keeps it off, null where it is on."""

    name: str
    providers: list[str]
    mode: str | None
    priced: bool
    status: Literal["on", "off"]
    switch_id: UUID | None


class OfferedModels(TypedDict):
    """Every model of the catalog, by name."""

    data: list[OfferedModel]
    next_cursor: None


class ModelSwitches(TypedDict):
    """Everything that is off, newest first."""

    data: list[ModelSwitch]
    next_cursor: None


class AdminModels:
    """Endpoints on the catalog and its switches."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog
        self._switches = services.switches

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/models",
                handler=self._models,
                needs="read",
                tag="models",
                summary="List the models that LiteLLM offers, and which of them are off",
                answers=OfferedModels,
            ),
            Operation(
                method="GET",
                path=_SWITCHES,
                handler=self._list,
                needs="read",
                tag="models",
                summary="List what is switched off",
                answers=ModelSwitches,
            ),
            Operation(
                method="POST",
                path=_SWITCHES,
                handler=self._off,
                needs="own",
                tag="models",
                summary="Switch models, or all of a provider, off: from the next call on",
                body=SwitchBody,
                answers=ModelSwitch,
                status=201,
            ),
            Operation(
                method="DELETE",
                path=_SWITCHES + "/{switch_id}",
                handler=self._on,
                needs="own",
                tag="models",
                summary="Switch them on again",
                status=204,
            ),
        ]

    async def _models(self, _request: Request, _operator: Operator) -> Response:
        switched = await self._switches.refresh()
        offered: OfferedModels = {
            "data": [
                _offered(model, switched.find(model.name, model.providers))
                for model in self._catalog.all()
            ],
            "next_cursor": None,
        }
        return answer(offered)

    async def _list(self, _request: Request, _operator: Operator) -> Response:
        switched = await self._switches.refresh()
        shown: ModelSwitches = {
            "data": [_switch(each) for each in reversed(switched.switches)],
            "next_cursor": None,
        }
        return answer(shown)

    async def _off(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), SwitchBody)
        kind = "provider" if body.model is None else "model"
        pattern = body.model or body.provider or ""
        switch_id = await self._switches.switch_off(
            kind=kind, pattern=pattern, reason=body.reason, actor=operator.name
        )
        switched = await self._switches.refresh()
        made = next((each for each in switched.switches if each.switch_id == switch_id), None)
        if made is None:
            raise NotFoundError("Somebody switched it on again in the meantime. Send it again.")
        return answer(_switch(made), 201)

    async def _on(self, request: Request, operator: Operator) -> Response:
        switch_id = uuid_in(request, "switch_id")
        if switch_id is None or not await self._switches.switch_on(switch_id, actor=operator.name):
            message = f"Nothing is off by a switch with that id. GET {_SWITCHES} lists them."
            raise NotFoundError(message)
        await self._switches.refresh()
        return Response(status_code=204)


def _offered(model: Model, off: Switch | None) -> OfferedModel:
    return {
        "name": model.name,
        "providers": sorted(model.providers),
        "mode": model.mode,
        "priced": model.prices is not None,
        "status": "on" if off is None else "off",
        "switch_id": None if off is None else off.switch_id,
    }


def _switch(switch: Switch) -> ModelSwitch:
    is_model = switch.kind == "model"
    return {
        "id": switch.switch_id,
        "model": switch.pattern if is_model else None,
        "provider": None if is_model else switch.pattern,
        "reason": switch.reason,
        "switched_by": switch.switched_by,
        "switched_at": utc(switch.switched_at),
    }
