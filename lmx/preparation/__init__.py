"""Preparing corpora: clean, without duplicates, split, tokenized, written once; looked at; compared with others."""
