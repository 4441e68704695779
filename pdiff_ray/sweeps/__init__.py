"""Sweeps: their trials, what to try next, and the tables, figures and page that come of them. Imports estimates
and below.
"""
