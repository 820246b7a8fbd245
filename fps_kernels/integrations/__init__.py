"""Ways into the tools that people already use. Each file imports its library, and only whoever asks for it."""
