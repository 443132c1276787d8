"""One tree per key, across crashes of its supervisor."""
