"""A model's weights as matrices: which there are, whose they are, how they are seen at work, and what they are for."""
