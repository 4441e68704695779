"""Experiments and sweeps from plan to result: what command line and Python API call. Imports every layer below."""
