"""TensorBoard's files cost no more than writing them."""

import subprocess
import sys

SCRIPT = """
import sys
from lmx.training.metrics import MetricsWriter

with MetricsWriter(sys.argv[1]) as writer:
    writer.write(1, {"train/loss": 1.0})
print("torch" in sys.modules)
"""


def test_pytorch_is_not_imported_where_it_is_installed(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text("raise RuntimeError('imported')")  # one that is installed, if none is
    script = "import sys; sys.path.insert(0, sys.argv.pop(1))\n" + SCRIPT
    command = [sys.executable, "-c", script, str(tmp_path / "site"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert list((tmp_path / "run" / "tensorboard").iterdir())
