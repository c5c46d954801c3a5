"""HTTP: the data plane, the account and admin APIs, and what operations look at."""
