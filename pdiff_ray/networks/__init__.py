"""Networks by name, which of their parameters are generated, what the others compute once, and what may be permuted.
Imports data and below.
"""
