"""Examples as the model sees them: masks, targets, segments and how rows are filled."""

import pytest
from rich.console import Console

from lmx import cli
from lmx.config import Config
from lmx.errors import ConfigError
from lmx.preparation.examples import look, open_examples


@pytest.fixture
def texts(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"Number {number} é <b>\n" * (number % 4 + 1))
    return f"text:{tmp_path}"


def config(texts: str, objective: str, **sections) -> Config:
    model = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16, **sections.pop("model", {})}
    data = {"train": texts, "length": 64, **sections.pop("data", {})}
    return Config().replace(model=model, data=data, objective={"name": objective}, train={"global_batch_size": 4})


def test_next_tokens(texts):
    rows, (filling,) = look(open_examples(config(texts, "causal"), Console(quiet=True)), 2, 5)
    assert [row.stack for row in rows] == ["", ""]
    tokens = [token for row in rows for token in row.tokens]
    assert {token.text for token in tokens if token.special} == {"<bos>"}
    assert any(token.text == "é" for token in tokens) and all(token.predicted for token in tokens)
    assert {token.target for token in tokens if token.target} <= {"<eos>", *map(chr, range(128))}
    assert (filling.rows, filling.length) == (20, 64) and 0.9 < filling.efficiency <= 1
    assert filling.lengths.sum() == filling.tokens


def test_masked_tokens_show_what_is_predicted(texts):
    heads = {"architecture": "encoder", "heads": ("mlm",)}
    rows, (filling,) = look(open_examples(config(texts, "mlm", model=heads), Console(quiet=True)), 4, 5)
    tokens = [token for row in rows for token in row.tokens]
    masked = [token for token in tokens if token.text == "<mask>"]
    assert masked and all(token.predicted and token.target for token in masked)
    assert 0.05 < filling.predicted / filling.tokens < 0.3


def test_rows_that_are_not_full_are_counted(texts):
    unpacked = {"packing": False}
    _, (filling,) = look(open_examples(config(texts, "causal", data=unpacked), Console(quiet=True)), 1, 10)
    assert filling.efficiency == filling.tokens / (40 * 64) < 0.9
    assert len(filling.lengths) == 40


def test_a_config_for_more_devices_than_there_are(texts):
    big = config(texts, "causal").replace(mesh={"fsdp": 64, "tensor": 8})
    assert len(look(open_examples(big, Console(quiet=True)), 1, 1)[0]) == 1
    with pytest.raises(ConfigError, match="makes no examples"):
        open_examples(config(texts, "none"), Console(quiet=True))


def test_the_command_prints_and_writes_a_page(texts, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["data", "inspect", "--source", texts, "--rows", "2", "--batches", "2", "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "Number" in told and "packing efficiency" in told and str(page) in told.replace("\n", "")
    html = page.read_text()
    assert "&lt;" in html and "<b>\n" not in html and 'class="s0' in html and "http" not in html
    assert cli.main(["data", "inspect"]) == 2
    assert "needs --config, --source or both" in " ".join(capsys.readouterr().err.split())
