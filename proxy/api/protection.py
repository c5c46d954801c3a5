"""What keeps the account and admin APIs from being overrun, put together by `app`."""

from dataclasses import dataclass

from proxy.attempts import FailedAttempts
from proxy.networks import Addresses
from proxy.rates import Rates


@dataclass(frozen=True, slots=True)
class Protection:
    """One process's; each process counts for itself.

    `account_rates` are those of accounts, `admin_rates` those of operators. `hsts_max_age_s` is
    what browsers are told of HTTPS, 0 for nothing.
    """

    addresses: Addresses
    attempts: FailedAttempts
    account_rates: Rates
    admin_rates: Rates
    hsts_max_age_s: int
