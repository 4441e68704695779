"""The typed schema of experiments and sweeps, and how files become one. Imports common alone."""
