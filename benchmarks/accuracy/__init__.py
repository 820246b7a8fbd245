"""Accuracy of every way of tuning."""
