"""LiteLLM's control endpoints: models and prices, token counts, liveness. Never a customer's call.

It speaks httpx, as webhooks do; everything customers wait for goes over `upstream`.
"""

from typing import Any

import httpx

# What a LiteLLM that is away, broken or not LiteLLM looks like.
CONTROL_ERRORS = (httpx.HTTPError, ValueError, KeyError, TypeError)


def describe(error: Exception) -> str:
    """Say in a few words what one of CONTROL_ERRORS means."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"answers {error.response.status_code} to GET {error.request.url.path}"
    return f"gives no list of models ({type(error).__name__})"


class LiteLLMControl:
    """A client of one LiteLLM with its master key. Methods raise one of CONTROL_ERRORS."""

    def __init__(self, url: str, key: str, *, timeout_s: float = 10.0) -> None:
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {key}"},
            timeout=timeout_s,
            # The environment's proxies are for the internet, and LiteLLM is a neighbour.
            trust_env=False,
        )

    async def models(self) -> list[dict[str, Any]]:
        """Deployments as `GET /model/info` lists them."""
        response = await self._client.get("/model/info")
        response.raise_for_status()
        return list(response.json()["data"])

    async def count_tokens(self, model: str, messages: object) -> int:
        """Count the prompt exactly, with the model's own tokenizer (`/utils/token_counter`)."""
        response = await self._client.post(
            "/utils/token_counter", json={"model": model, "messages": messages}
        )
        response.raise_for_status()
        return int(response.json()["total_tokens"])

    async def details(self) -> dict[str, Any]:
        """What LiteLLM tells of itself: version, cache (`GET /health/readiness/details`)."""
        response = await self._client.get("/health/readiness/details")
        response.raise_for_status()
        return dict(response.json())

    async def is_alive(self) -> bool:
        """Whether LiteLLM answers its liveness check, within two seconds."""
        try:
            response = await self._client.get("/health/liveliness", timeout=2)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
