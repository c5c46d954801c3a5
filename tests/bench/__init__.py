"""`make bench`: what metering costs, side by side in one run."""
