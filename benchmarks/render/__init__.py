"""README, documentation and plots, made from the results files."""
