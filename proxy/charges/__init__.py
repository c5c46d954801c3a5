"""Charges for metered actions: what customers pay that is no request to a model.

A charge goes through the same hold and the same settlement as a request, under an id of its own,
and stands among the account's usage with the endpoint `charges` and its action as the model.
"""

from proxy.charges.making import Charges, Ending, Order, Payer, payer_of, status_of
from proxy.charges.recurring import RecurringCharges, Subscription
from proxy.charges.schedule import Change, RecurringStore
from proxy.charges.store import ChargeStore

__all__ = [
    "Change",
    "ChargeStore",
    "Charges",
    "Ending",
    "Order",
    "Payer",
    "RecurringCharges",
    "RecurringStore",
    "Subscription",
    "payer_of",
    "status_of",
]
