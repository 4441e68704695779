"""Images: where they come from, how they are cached, splits and batches. Imports config and common."""
