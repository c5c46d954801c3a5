"""The data plane, `/v1/*`, on plain ASGI: chat completions and the models that a key may use.

Every other path answers 404 `unsupported_endpoint`: nothing reaches a provider unmetered.
"""

import logging

from proxy.api.services import Services
from proxy.catalog import Model
from proxy.errors import NotFoundError, TallygateError
from proxy.exchange import Exchange, Receive, Scope, Send
from proxy.principals import may_use_model

log = logging.getLogger(__name__)

_MODELS = "/v1/models"


class DataPlane:
    """Routes the requests of SDKs."""

    def __init__(self, services: Services) -> None:
        self._relay = services.relay
        self._principals = services.principals
        self._catalog = services.catalog
        self._stall_timeout_s = services.client_stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        exchange = Exchange(scope, receive, send, stall_timeout_s=self._stall_timeout_s)
        try:
            if scope["path"] == "/v1/chat/completions" and scope["method"] == "POST":
                await self._relay.chat(exchange)
            else:
                await self._other(exchange, scope["method"], scope["path"])
        except TallygateError as error:
            # The answer had begun and can't be completed: the server breaks the connection off,
            # which tells every SDK that what it has is not whole.
            log.warning(
                "answer broken off",
                extra={"request_id": exchange.request_id, "code": error.code},
            )
            raise
        except Exception:
            log.exception("request failed", extra={"request_id": exchange.request_id})
            if exchange.status is not None:
                raise
            message = "The request failed here. It is not charged; an operator will look at it."
            await exchange.respond_error(TallygateError(message))
        finally:
            exchange.stop_watching()

    async def _other(self, exchange: Exchange, method: str, path: str) -> None:
        try:
            if method == "GET" and path == _MODELS:
                await exchange.respond_json(200, await self._models(exchange))
            elif method == "GET" and path.startswith(_MODELS + "/"):
                name = path.removeprefix(_MODELS + "/")
                await exchange.respond_json(200, await self._model(exchange, name))
            else:
                message = f"{method} {path} is not offered here. See GET {_MODELS} for models."
                raise NotFoundError(message, code="unsupported_endpoint")
        except TallygateError as error:
            await exchange.respond_error(error)

    async def _models(self, exchange: Exchange) -> dict[str, object]:
        principal = await self._principals.authenticate(exchange.virtual_key, fresh=True)
        return {
            "object": "list",
            "data": [
                _as_openai(model)
                for model in self._catalog.all()
                if may_use_model(principal, model.name)
            ],
        }

    async def _model(self, exchange: Exchange, name: str) -> dict[str, object]:
        principal = await self._principals.authenticate(exchange.virtual_key, fresh=True)
        model = self._catalog.get(name)
        if model is None or not may_use_model(principal, name):
            message = f"The model {name!r} does not exist here, or this key may not use it."
            raise NotFoundError(message, code="model_not_found", param="model")
        return _as_openai(model)


def _as_openai(model: Model) -> dict[str, object]:
    # LiteLLM does not say when a model was made; OpenAI's clients require a number.
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": model.provider or "tallygate",
    }
