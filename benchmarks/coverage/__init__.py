"""Models of five libraries, built from their configurations without weights: chosen from, tuned, stored and put back."""
