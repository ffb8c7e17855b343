"""Scoring trained models: each task its own file."""
