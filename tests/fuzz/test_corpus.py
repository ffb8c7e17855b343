"""What fuzzing found stays mended: every input that a reader once choked on is answered."""

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, call, seeds

CORPUS = Path(__file__).with_name("corpus")
FOUND = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_answered(path, tmp_path):
    call(path.parent.name, path.read_bytes(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read(name, tmp_path):
    for content in seeds(name):
        call(name, content, tmp_path)
