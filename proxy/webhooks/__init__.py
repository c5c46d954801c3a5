"""Webhooks: the operator's receivers are told what happens to accounts, in order and at least once.

`watch` finds what is to be told and PostgreSQL keeps it (`store`); `delivery` sends it until it is
taken, signed as Standard Webhooks has it.
"""

from proxy.webhooks.addresses import Reach, WebhookAddressError, check_url
from proxy.webhooks.delivery import Delivery, RetryPolicy
from proxy.webhooks.events import EVENT_TYPES
from proxy.webhooks.sender import Sender
from proxy.webhooks.signing import new_secret
from proxy.webhooks.store import Backlog, WebhookStore
from proxy.webhooks.watch import Watch

__all__ = [
    "EVENT_TYPES",
    "Backlog",
    "Delivery",
    "Reach",
    "RetryPolicy",
    "Sender",
    "Watch",
    "WebhookAddressError",
    "WebhookStore",
    "check_url",
    "new_secret",
]
