"""What a request costs and what it is sold for: integers only, no clock, no I/O.

Every result is a deterministic function of its arguments, so that an auditor can recompute each
bill from the stored rows. Amounts are integers whose unit stands last in the name: `_nanos` and
`_picos` of a US dollar, `_attos` (1e-18 USD) where a rounding is accounted for.
"""
