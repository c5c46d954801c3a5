"""Where webhooks may go: https, and no address of the own network unless the operator says so.

A receiver's URL is typed by an operator, but the service stands where it can reach more than they
may. The name is resolved before each attempt, and the connection goes to an address that was
checked, so that a name can't lead elsewhere a moment later.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_URL_CHARACTERS = 2000
_PORTS = {"http": 80, "https": 443}
# RFC 6052: the IPv4 address stands in the last 32 bits.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class WebhookAddressError(ValueError):
    """This URL is none, or leads where webhooks may not go; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far webhooks may go."""

    # Without encryption.
    allow_http: bool
    # To addresses that are not the internet's: loopback, private, link-local.
    allow_private: bool


def check_url(url: str, reach: Reach) -> SplitResult:
    """Take a URL apart; WebhookAddressError where nothing may be sent there.

    What its name resolves to is looked at only when something is sent.
    """
    if len(url) > _MAX_URL_CHARACTERS:
        msg = f"must be at most {_MAX_URL_CHARACTERS} characters"
        raise WebhookAddressError(msg)
    if not (url.isascii() and url.isprintable()) or " " in url:
        msg = "must be printable ASCII: escape other characters, and write names in Punycode"
        raise WebhookAddressError(msg)
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0 and parts.scheme in _PORTS
    except ValueError:
        parts, is_whole = SplitResult("", "", "", "", ""), False
    if not is_whole:
        raise WebhookAddressError("must be a URL such as https://example.com/webhooks")
    if parts.scheme == "http" and not reach.allow_http:
        msg = "must begin with https:// (webhooks.allow_http in config.yaml would allow this)"
        raise WebhookAddressError(msg)
    if "@" in parts.netloc or parts.fragment:
        raise WebhookAddressError("must hold no user, no password and no #fragment")
    name = parts.hostname or ""
    address = _address_or_none(name)
    if address is None and (name == "localhost" or name.endswith(".localhost")):
        address = ipaddress.IPv4Address("127.0.0.1")
    if address is not None and not _may_go(address, reach):
        raise WebhookAddressError(_not_public(name))
    return parts


async def resolve(parts: SplitResult, reach: Reach) -> list[str]:
    """Look up the addresses of a checked URL that may be gone to, as hosts of a URL.

    Raises WebhookAddressError where there is none, OSError where the name has no address.
    """
    name = parts.hostname or ""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            name, port_of(parts), type=socket.SOCK_STREAM
        )
    except UnicodeError:  # a label of more than 63 characters, or of none
        msg = f"{name[:100]} is no name of a host"
        raise WebhookAddressError(msg) from None
    addresses = dict.fromkeys(ipaddress.ip_address(str(item[4][0])) for item in found)
    allowed = [address for address in addresses if _may_go(address, reach)]
    if not allowed:
        raise WebhookAddressError(_not_public(name))
    return [f"[{each}]" if each.version == 6 else str(each) for each in allowed]


def port_of(parts: SplitResult) -> int:
    """Return the port of a checked URL."""
    return parts.port or _PORTS[parts.scheme]


def _address_or_none(name: str) -> _Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _may_go(address: _Address, reach: Reach) -> bool:
    if reach.allow_private:
        return True
    if isinstance(address, ipaddress.IPv6Address):
        # Addresses that carry another one are as far away as that.
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo is not None:
            inner = address.teredo[1]
        if inner is not None:
            return _may_go(inner, reach)
    return address.is_global and not address.is_multicast


def _not_public(name: str) -> str:
    return (
        f"{name} is no address of the internet (webhooks.allow_private in config.yaml would "
        "allow it)"
    )
