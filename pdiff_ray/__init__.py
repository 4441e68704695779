"""Neural network diffusion as a Ray system: zoos of networks, generators of weights, and their evaluation."""

__version__ = "0.1.0"
