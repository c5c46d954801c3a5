"""Where a request comes from, as far as that can be trusted."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Addresses:
    """Tells clients' addresses; `trusted` are the networks of the proxies in front of us."""

    def __init__(self, trusted: Sequence[str] = ()) -> None:
        self._trusted = [ip_network(text) for text in trusted]

    def of(self, peer: str | None, forwarded_for: str | None) -> Address | None:
        """Return the client's address; None where it can't be told.

        `peer` is who connected to us. X-Forwarded-For counts only where that is a proxy of ours,
        and from its end: the first entry that is not ours was written by one of ours, and all
        before it may be made up.
        """
        address = _address(peer)
        if forwarded_for is None or address is None:
            return address
        for hop in reversed(forwarded_for.split(",")):
            if not is_within(address, self._trusted):
                break
            address = _address(hop.strip())
            if address is None:
                return None
        return address


def is_within(address: Address | None, networks: Sequence[Network]) -> bool:
    """Whether an address lies in one of the networks; an unknown one lies in none."""
    return address is not None and any(address in network for network in networks)


def _address(text: str | None) -> Address | None:
    try:
        address = ip_address(text or "")
    except ValueError:
        return None
    # A socket that listens for IPv6 sees IPv4 clients as ::ffff:192.0.2.1.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
