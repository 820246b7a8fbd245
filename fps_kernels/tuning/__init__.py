"""How the chosen entries train: compact values beside frozen weights, and their optimizer. Knows nothing of choosing."""
