"""The command line: what is typed and what is printed. Imports every layer, and waits with that until a command
runs.
"""
