"""From text to batches: corpora, tokenizers, packing and the input pipeline.

:func:`~lmx.text.corpora.open_source` opens a source string, :func:`~lmx.text.tokenizers.make_tokenizer` trains or loads
a tokenizer, :class:`~lmx.text.packing.Cut` says how documents become rows, and
:func:`~lmx.text.pipeline.make_batches` puts it all together. Nothing here knows of models, and the parts of an
objective that it uses are named in :func:`~lmx.text.pipeline.make_batches`.
"""
