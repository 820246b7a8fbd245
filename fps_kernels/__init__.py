"""Choose the few weights worth tuning in one forward pass, and tune only those."""
