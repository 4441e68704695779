"""Results as text, figures and pages, from numbers alone. Imports evaluation and what is below."""
