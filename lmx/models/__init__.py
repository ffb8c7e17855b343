"""The one Transformer, as pure Flax modules. Start reading in :mod:`lmx.models.transformer`."""
