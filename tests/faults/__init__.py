"""Sweeps on a simulated cluster whose parts fail, one after another, end as if nothing had happened."""
