"""Networks by name, which of their parameters are generated, and what the others compute once. Imports data and
below.
"""
