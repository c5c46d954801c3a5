"""Who works with the admin API, and what each role may do."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from uuid import UUID

# What an operation of the admin API needs: to look; to help customers (accounts, keys, projects);
# to move money and set prices; to run the service itself (admin keys, models, webhooks, erasure).
ROLES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "owner": frozenset({"read", "support", "finance", "own"}),
        "finance": frozenset({"read", "finance"}),
        "support": frozenset({"read", "support"}),
        "read-only": frozenset({"read"}),
    }
)

# Whoever holds the key of the settings, by name.
OWNER_NAME = "admin"


@dataclass(frozen=True, slots=True)
class Operator:
    """Whoever sent an admin key; `name` is what the audit trail calls them."""

    name: str
    role: str
    # None for the key of the settings.
    admin_key_id: UUID | None = None

    def may(self, needs: str) -> bool:
        """Whether the role allows what an operation needs."""
        return needs in ROLES[self.role]

    def may_give(self, role: str) -> bool:
        """Whether the role holds all that another one does: nobody makes a key above the own."""
        return ROLES[role] <= ROLES[self.role]
