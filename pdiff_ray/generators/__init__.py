"""Generators: what learns the distribution of a zoo's vectors and draws new ones. Plain PyTorch. Imports training
and below.
"""
