"""A rule for each kind of ATen operator: what it does to labels."""
