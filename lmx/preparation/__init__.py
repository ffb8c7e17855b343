"""Preparing corpora: cleaned, without duplicates, split, tokenized and written once; looked at; compared with others."""
