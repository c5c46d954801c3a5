"""Each guard of the ledger removed in turn: see `make mutation`."""
