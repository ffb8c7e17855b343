"""Beam's local runner writes what one machine writes, byte for byte."""

import pytest
from rich.console import Console

from lmx import config as schema
from lmx.errors import LmxError
from lmx.preparation.beam import beam_runner
from lmx.preparation.prepare import prepare
from tests.preparation.corpora import contents, run, settings, write_corpus


@pytest.mark.parametrize("duplicates", ["near", "exact", "keep"])
def test_the_same_bytes(tmp_path, duplicates):
    pytest.importorskip("rensa")
    pytest.importorskip("apache_beam")
    sources = write_corpus(tmp_path)
    run(tmp_path / "here", sources, duplicates=duplicates)
    output, console = tmp_path / "beam", Console(quiet=True)
    chosen = settings(sources, duplicates=duplicates)
    prepare(chosen, schema.Tokenizer(), output, console, runner=beam_runner("DirectRunner", []))
    assert contents(output) == contents(tmp_path / "here")


def test_an_unknown_runner_is_named():
    pytest.importorskip("apache_beam")
    with pytest.raises(LmxError, match="--runner NoSuchRunner"):
        beam_runner("NoSuchRunner", [])


def test_without_the_package_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(LmxError, match=r"pip install 'lmx\[beam\]'"):
        beam_runner("DirectRunner", [])
