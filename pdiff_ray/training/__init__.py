"""Training steps: optimizers, schedules, and subsets trained on from the base. Imports evaluation and below."""
