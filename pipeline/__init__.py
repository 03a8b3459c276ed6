"""Untaxed: safety alignment for reasoning language models without the safety tax."""

__version__ = "0.1.0"
