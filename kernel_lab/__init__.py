"""What shows that the Triton kernels are right without a GPU. Not in the wheel; of the package it imports only ``ops``."""
