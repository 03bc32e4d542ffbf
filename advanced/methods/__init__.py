"""One idea per file; each names its papers."""
