"""``lmx bench``: lmx beside PyTorch and transformers on the same work in the same run, and the machine's limit."""
