"""What autograd keeps for the backward pass, in 8 bits: of any model, attached or not."""
