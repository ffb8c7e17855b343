"""Jobs on several machines: an engine's own file for ``lmx train``, and its hand-over to that engine."""
