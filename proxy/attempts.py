"""Keys that turned out to be nobody's, by where they came from.

Nobody guesses 256 random bits; but whoever tries keeps the database busy. So an address that sent
too many wrong keys in a minute is refused without a look at them.
"""

from ipaddress import IPv6Address, ip_network

from proxy.exchange import Exchange
from proxy.networks import Address, Addresses
from proxy.rates import Rates

# One customer of a provider has so much of IPv6 to himself.
_IPV6_SITE_BITS = 64


class FailedAttempts:
    """Counts the failures of each address; whoever has not failed costs nothing here."""

    def __init__(self, per_minute: int, addresses: Addresses) -> None:
        self._rates = Rates(per_minute)
        self._addresses = addresses
        self._has_failures = False

    def check(self, exchange: Exchange) -> None:
        """RateLimitError where the address has failed too often."""
        if not self._has_failures:
            return
        site = self._site(exchange)
        rate = None if site is None else self._rates.look(site)
        if rate is not None and not rate.is_allowed:
            message = (
                "Too many wrong API keys came from your address. Check the key that you send, and "
                f"try again in {rate.retry_after_s} s."
            )
            raise rate.refusal(message)

    def note(self, exchange: Exchange) -> None:
        """Count a key that is nobody's."""
        site = self._site(exchange)
        if site is not None:
            self._has_failures = True
            self._rates.take(site)

    def _site(self, exchange: Exchange) -> str | None:
        address = self._addresses.of(exchange.peer, exchange.header(b"x-forwarded-for"))
        return None if address is None else _site_of(address)


def _site_of(address: Address) -> str:
    if isinstance(address, IPv6Address):
        return str(ip_network((address, _IPV6_SITE_BITS), strict=False))
    return str(address)
