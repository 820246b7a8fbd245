"""Which entries are worth tuning: statistics, a scorer and a budget make a selection. Knows nothing of tuning."""
