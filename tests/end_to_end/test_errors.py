"""Bad input: one paragraph that says what to do, exit status 2, and nothing written."""

import gzip
import json
import os
import shutil

import pytest

from lmx.cli import main
from tests.end_to_end.conftest import QUICKSTART

CLASSIFIER = """
from lmx.config import Config, Data, Model, Objective, Tokenizer, config_dict

def get_config(variant=None):
    return config_dict(Config(
        model=Model(architecture="encoder", heads=("classification",), embed_dim=16, num_heads=2),
        objective=Objective(name="classification"), tokenizer=Tokenizer(kind="bytes"), data=Data(length=64)))
"""


def fails(capsys, *arguments):
    """Runs a command in this process; returns the one paragraph it printed."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.startswith("error:") and "\n\n" not in error.strip()
    return " ".join(error.split())


def train_fails(capsys, tmp_path, *overrides, config=QUICKSTART):
    workdir = tmp_path / "run"
    flags = [f"--config.{override}" for override in overrides]
    message = fails(capsys, "train", "--config", config, "--workdir", workdir, *flags)
    left = {path.name for path in workdir.iterdir()} if workdir.exists() else set()
    assert not left & {"config.json", "metrics.jsonl", "checkpoints"}
    return message


def test_an_unknown_field_names_the_nearest(capsys, tmp_path):
    assert "'train.stesp'; did you mean 'train.steps'?" in train_fails(capsys, tmp_path, "train.stesp=3")


def test_a_wrong_type_names_the_field_and_what_it_means(capsys, tmp_path):
    message = train_fails(capsys, tmp_path, "train.steps=many")
    assert "train.steps must be int, not 'many'" in message and "Optimizer steps" in message


def test_widths_that_do_not_divide(capsys, tmp_path):
    message = train_fails(capsys, tmp_path, "model.embed_dim=130")
    assert "model.embed_dim (130) is not divisible by model.num_heads (4)" in message


def test_a_mesh_that_does_not_fit_says_which_sizes_would(capsys, tmp_path):
    message = train_fails(capsys, tmp_path, "mesh.tensor=3", "mesh.data=1")
    assert "tensor=3" in message and "there are 8" in message and "1, 2, 4, 8" in message


def test_a_batch_that_does_not_divide_is_not_changed(capsys, tmp_path):
    message = train_fails(capsys, tmp_path, "train.global_batch_size=12")
    assert "train.global_batch_size (12) does not divide over mesh data x fsdp x expert = 8" in message
    assert "8 or 16" in message


def test_a_missing_file(capsys, tmp_path):
    assert f"{tmp_path}/none.txt" in train_fails(capsys, tmp_path, f"data.train=text:{tmp_path}/none.txt")


def test_a_missing_experiment_names_the_nearest(capsys, tmp_path):
    message = fails(capsys, "train", "--config", QUICKSTART.replace("quickstart", "quikstart"), "--workdir", tmp_path)
    assert "did you mean 'quickstart.py'" in message


def test_an_empty_corpus(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in train_fails(capsys, tmp_path, f"data.train=text:{tmp_path}/empty.txt").lower()


def test_undecodable_bytes_name_the_file_and_the_offset(capsys, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    message = train_fails(capsys, tmp_path, f"data.train=text:{tmp_path}/latin.txt")
    assert "latin.txt" in message and "3" in message.split("latin.txt")[1] and "UTF-8" in message


def test_a_broken_archive_is_an_error_of_the_file(capsys, tmp_path):
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 1000)[:-20])
    assert "cut.txt.gz" in train_fails(capsys, tmp_path, f"data.train=text:{tmp_path}/cut.txt.gz")


@pytest.mark.parametrize("line", ['{"text": "b"}', '{"text": "b", "label"', "[1]"])
def test_a_bad_line_of_jsonl_names_file_and_line(capsys, tmp_path, line):
    good = json.dumps({"text": "a", "label": 0})
    (tmp_path / "data.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    (tmp_path / "classify.py").write_text(CLASSIFIER)
    source = f"jsonl:{tmp_path}/data.jsonl"
    overrides = (f"data.train={source}", f"data.eval={source}", "mesh.data=-1")
    message = train_fails(capsys, tmp_path, *overrides, config=tmp_path / "classify.py")
    assert "data.jsonl" in message and "line 2" in message.replace("data.jsonl:2", "line 2")


def test_a_vocabulary_smaller_than_the_tokenizer(capsys, tmp_path):
    message = train_fails(capsys, tmp_path, "model.vocab_size=100")
    assert "model.vocab_size (100) is smaller than the tokenizer's vocabulary (261)" in message


def test_a_checkpoint_of_another_shape_names_the_parameter(capsys, tmp_path, tiny_run):
    message = train_fails(capsys, tmp_path, f"train.init_from={tiny_run}", "model.mlp_dim=64")
    assert (
        "decoder/layers/block_0/mlp/in/kernel" in message and "(4, 128, 64)" in message and "(4, 128, 512)" in message
    )


def test_a_vocabulary_that_does_not_match_the_checkpoint(capsys, tmp_path, tiny_run):
    message = train_fails(capsys, tmp_path, f"train.init_from={tiny_run}", "model.vocab_size=300")
    assert "embeddings/tokens/table" in message and "(300, 128)" in message and "(261, 128)" in message


def test_a_damaged_config_json(capsys, tmp_path, tiny_run):
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    for command in (["generate", "--prompt", "a"], ["eval"]):
        assert "config.json is damaged" in fails(capsys, *command, "--workdir", tmp_path / "run")


def test_a_folder_that_is_no_run(capsys, tmp_path):
    for command in (["generate", "--prompt", "a"], ["predict", "--text", "a"], ["eval"]):
        assert str(tmp_path) in fails(capsys, *command, "--workdir", tmp_path)
    assert not os.listdir(tmp_path)


def test_a_decoder_does_not_classify(capsys, tiny_run):
    assert "no classifier" in fails(capsys, "predict", "--workdir", tiny_run, "--text", "a")


def test_an_unknown_argument(capsys, tiny_run):
    assert "--promt" in fails(capsys, "eval", "--workdir", tiny_run, "--promt", "a")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no model"):
        main(["generate", "--debug", "--workdir", str(tmp_path), "--prompt", "a"])


@pytest.mark.parametrize("command", ["train", "eval", "generate", "predict", "tokenizer"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_help_config_lists_every_field(capsys):
    assert main(["train", "--help-config"]) == 0
    assert "--config.optimizer.learning_rate" in capsys.readouterr().out
