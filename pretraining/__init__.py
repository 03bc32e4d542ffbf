"""Next-token training on plain text."""
