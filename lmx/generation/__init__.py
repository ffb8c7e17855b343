"""Text out of a trained model: decoding with a cache, and the choice of each token. Start in :mod:`.decode`."""
