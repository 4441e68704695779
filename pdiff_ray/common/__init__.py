"""What every layer uses: errors, names, seeds, devices, progress. Imports nothing of the package."""
