"""Whatever happens to a checkpoint's files, it is known before any of it is used, and the one before is taken."""

import shutil
from pathlib import Path

import pytest

from lmx.errors import CheckpointError
from lmx.training.checkpoints import Checkpoints
from lmx.training.manifest import MANIFEST, WRITTEN_AT_COMMIT, damaged_files, write_manifest

from .test_checkpoints import abstract, assert_equal, make_state


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A workdir with checkpoints 1 and 2; to be copied, not changed."""
    workdir = tmp_path_factory.mktemp("two")
    with Checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"next_index": step}, {})
    return workdir


def newest(workdir):
    """The newest checkpoint that is whole, and what the reader was told."""
    told = []
    with Checkpoints(workdir) as checkpoints:
        found = checkpoints.restore_newest(abstract(make_state()), told.append)
    return found, " ".join(told)


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip,
    "missing bytes": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a missing file": lambda path: path.unlink(),
}


def test_every_file_is_in_the_manifest_before_the_checkpoint_is_there(two_checkpoints):
    folder = two_checkpoints / "checkpoints" / "2"
    assert damaged_files(folder) == []
    for name in files_of(folder):
        original = (folder / name).read_bytes()
        flip(folder / name)
        damaged = damaged_files(folder)
        assert damaged if name == MANIFEST else damaged == ([] if name in WRITTEN_AT_COMMIT else [name])
        (folder / name).write_bytes(original)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_and_told_of_and_the_one_before_is_taken(damage, two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    victim = max((workdir / "checkpoints" / "2" / "params" / "ocdbt.process_0" / "d").iterdir())
    DAMAGES[damage](victim)
    (state, position, meta), told = newest(workdir)
    assert_equal(state, make_state(1))
    assert (position, meta["step"]) == ({"next_index": 1}, 1)
    assert "checkpoint 2 in" in told and victim.name in told and "2.damaged" in told and "step 1" in told
    with Checkpoints(workdir) as checkpoints:  # and its place is free
        assert checkpoints.steps() == [1]
        assert checkpoints.save(2, make_state(2), {"next_index": 2}, {})
    (state, _, _), told = newest(workdir)
    assert_equal(state, make_state(2))
    assert not told


@pytest.mark.exhaustive
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_file_can_be_damaged_unseen(damage, two_checkpoints, tmp_path):
    for index, name in enumerate(files_of(two_checkpoints / "checkpoints" / "2")):
        workdir = tmp_path / str(index)
        shutil.copytree(two_checkpoints, workdir)
        DAMAGES[damage](workdir / "checkpoints" / "2" / name)
        (state, _, meta), told = newest(workdir)
        assert_equal(state, make_state(meta["step"]))
        assert meta["step"] == 2 or told, name
        if name not in (MANIFEST, *WRITTEN_AT_COMMIT):
            assert meta["step"] == 1, name


def test_all_damaged_is_an_error_and_no_fresh_start(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    for step in "12":
        flip(workdir / "checkpoints" / step / "data" / "metadata")
    with Checkpoints(workdir) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 1 in .* is damaged .*data/metadata.*no earlier one"):
            checkpoints.restore_newest(abstract(make_state()), lambda _: None)


def test_a_reader_is_refused_what_it_reads_and_moves_nothing(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    flip(workdir / "checkpoints" / "2" / "params" / "array_metadatas" / "process_0")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 2 in .* is damaged .*params/array_metadatas/process_0"):
            checkpoints.restore_params()
        assert checkpoints.steps() == [1, 2]
        assert_equal(checkpoints.restore_params(step=1), make_state(1).params)


def test_a_checkpoint_without_a_manifest_is_read_and_told_of(two_checkpoints, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(two_checkpoints, workdir)
    (workdir / "checkpoints" / "2" / MANIFEST).unlink()
    (state, _, _), told = newest(workdir)
    assert_equal(state, make_state(2))
    assert "checkpoint 2 has no manifest" in told


def test_processes_share_the_work_and_leave_nothing_out(tmp_path):
    for name in "abcde":
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    for name in "abcde":
        (tmp_path / name).write_text("other")
    shares = [damaged_files(tmp_path, part=part, parts=3) for part in range(3)]
    assert all(shares) and sorted(sum(shares, [])) == list("abcde")
