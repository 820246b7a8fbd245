"""The methods that a plan compares, and what each means."""

METHODS = ("forward", "FPS", "GPS", "full", "LoRA", "attach", "full-8bit", "LoRA-8bit", "attach-8bit")
ASKED_FOR = ("full-8bit", "LoRA-8bit")
"""Methods that are not planned by default."""
MEANINGS = {
    "forward": "inference",
    "FPS": "choosing by FPS, micro-batches of 1",
    "GPS": "choosing by gradients, whole batch, cross-entropy",
    "full": "tuning every parameter, AdamW",
    "LoRA": "PEFT's LoRA r=8 on every linear layer but the head, biases and head whole, AdamW",
    "attach": "tuning the chosen entries, biases and head whole, MaskedAdamW",
    "full-8bit": "as full, what backward keeps in 8 bits (fps.kept)",
    "LoRA-8bit": "as LoRA, what backward keeps in 8 bits (fps.kept)",
    "attach-8bit": "as attach, what backward keeps in 8 bits (keep_bits=8)",
}
