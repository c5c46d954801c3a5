"""What the endpoints work with; put together by `app`, handed to each of them."""

from dataclasses import dataclass

from proxy.accounts import Accounts
from proxy.admin_keys import AdminKeys
from proxy.api.protection import Protection
from proxy.catalog import Catalog
from proxy.charges import Charges, ChargeStore, RecurringCharges, RecurringStore
from proxy.control import LiteLLMControl
from proxy.db import Pool
from proxy.directory import Directory
from proxy.estimates import Estimator
from proxy.expiring_credits import ExpiringCredits
from proxy.history import History
from proxy.keys import Keys
from proxy.ledger import Ledger
from proxy.log import RequestLog
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.privacy import Privacy
from proxy.projects import Projects
from proxy.relay import Relay
from proxy.reports import Reports
from proxy.spool import Spool
from proxy.statements import Statements
from proxy.summaries import Summaries
from proxy.switches import Switches
from proxy.tiers import Tiers
from proxy.trail import Trail
from proxy.unmetered import Unmetered
from proxy.webhooks import Reach, WebhookStore
from proxy.witness import WitnessReports


@dataclass(frozen=True, slots=True)
class Services:
    """One process's services. Secrets are plain strings here and go nowhere but to comparisons."""

    pool: Pool
    accounts: Accounts
    directory: Directory
    admin_keys: AdminKeys
    keys: Keys
    projects: Projects
    ledger: Ledger
    expiring_credits: ExpiringCredits
    reports: Reports
    trail: Trail
    history: History
    summaries: Summaries
    statements: Statements
    price_books: PriceBooks
    principals: Principals
    catalog: Catalog
    switches: Switches
    control: LiteLLMControl
    relay: Relay
    unmetered: Unmetered
    estimator: Estimator
    witness: WitnessReports
    spool: Spool
    webhooks: WebhookStore
    webhook_reach: Reach
    privacy: Privacy
    charges: Charges
    charge_store: ChargeStore
    recurring_charges: RecurringCharges
    recurring_store: RecurringStore
    request_log: RequestLog
    protection: Protection
    admin_key: str | None
    ops_token: str | None
    witness_token: str | None
    tiers: Tiers
    nanos_per_credit: int
    client_stall_timeout_s: float
