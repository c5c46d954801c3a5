"""A long, seeded run of the ledger's state machine: see `make soak`."""
