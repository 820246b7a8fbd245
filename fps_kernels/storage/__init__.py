"""Files and bits, knowing nothing of models: what is written is there whole or not at all, what is read is distrusted."""
