"""The fast paths: each one function, a plain reference beside it, and one place that chooses and reports."""
