"""Trees that are kept alive."""
