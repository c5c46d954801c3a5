"""What the endpoints work with; put together by `app`, handed to each of them."""

from dataclasses import dataclass

from proxy.accounts import Accounts
from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.db import Pool
from proxy.estimates import Estimator
from proxy.ledger import Ledger
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.relay import Relay
from proxy.reports import Reports
from proxy.spool import Spool
from proxy.unmetered import Unmetered
from proxy.witness import WitnessReports


@dataclass(frozen=True, slots=True)
class Services:
    """One process's services. Secrets are plain strings here and go nowhere but to comparisons."""

    pool: Pool
    accounts: Accounts
    ledger: Ledger
    reports: Reports
    price_books: PriceBooks
    principals: Principals
    catalog: Catalog
    control: LiteLLMControl
    relay: Relay
    unmetered: Unmetered
    estimator: Estimator
    witness: WitnessReports
    spool: Spool
    admin_key: str | None
    ops_token: str | None
    witness_token: str | None
    default_tier: str
    nanos_per_credit: int
    client_stall_timeout_s: float
