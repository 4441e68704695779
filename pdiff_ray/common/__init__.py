"""What every layer uses: errors, seeds, devices, progress. Imports nothing of the package."""
