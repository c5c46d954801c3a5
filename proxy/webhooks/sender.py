"""One attempt to deliver: the only place where webhooks speak httpx."""

import asyncio
from dataclasses import dataclass
from functools import cached_property

import httpx

from proxy.webhooks.addresses import Reach, WebhookAddressError, check_url, port_of, resolve

_GONE = 410


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of it: `status` is the receiver's, None where it did not answer."""

    status: int | None
    # In a few words; None where it was delivered.
    error: str | None

    @property
    def outcome(self) -> str:
        """One of the outcomes of finish_webhook in schema.sql."""
        if self.error is None:
            return "delivered"
        return "gone" if self.status == _GONE else "refused"


class Sender:
    """Posts to receivers: no redirects, no proxies of the environment, one time for all of it."""

    def __init__(self, reach: Reach, *, timeout_s: float) -> None:
        self._reach = reach
        self._timeout_s = timeout_s

    @cached_property
    def _client(self) -> httpx.AsyncClient:
        # Made when it is first needed: reading the authorities' certificates takes 30 ms.
        return httpx.AsyncClient(
            timeout=self._timeout_s,
            follow_redirects=False,
            trust_env=False,
            headers={"user-agent": "Tallygate-Webhooks/1", "content-type": "application/json"},
            # Connections are made to addresses. One that is kept would be taken for any name that
            # has the same address, with the certificate of another.
            # And with none that is kept there is nothing to close in the end.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def send(self, url: str, headers: dict[str, str], body: bytes) -> Attempt:
        """Post it; whatever goes wrong is told in the answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await self._post(url, headers, body)
        except TimeoutError:
            return Attempt(None, f"no answer within {self._timeout_s:g} s")
        except WebhookAddressError as error:
            return Attempt(None, str(error))
        except (httpx.TransportError, httpx.InvalidURL) as error:
            return Attempt(None, f"{type(error).__name__}: {error}"[:200])
        except OSError as error:
            return Attempt(None, f"the name can't be resolved: {error}"[:200])
        if 200 <= status < 300:
            return Attempt(status, None)
        hint = ", and redirects are not followed" if 300 <= status < 400 else ""
        return Attempt(status, f"answered {status}{hint}")

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> int:
        parts = check_url(url, self._reach)
        hosts = await resolve(parts, self._reach)
        headers = {**headers, "host": parts.netloc}
        for number, host in enumerate(hosts, 1):
            target = parts._replace(netloc=f"{host}:{port_of(parts)}").geturl()
            try:
                async with self._client.stream(
                    "POST",
                    target,
                    headers=headers,
                    content=body,
                    # The certificate has to be of the name.
                    extensions={"sni_hostname": parts.hostname},
                ) as response:
                    return response.status_code
            except httpx.ConnectError:
                if number == len(hosts):
                    raise
        raise AssertionError("resolve answers at least one address")
