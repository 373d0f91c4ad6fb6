"""The command line: what it loads, what it refuses, and with which exit code."""

import subprocess
import sys

import pytest
from click import Context
from typer.main import get_command
from typer.testing import CliRunner

from launch.cli import app

COMMANDS = [
    "demo",
    "prepare",
    "verify",
    "plan",
    "train",
    "launch",
    "evaluate",
    "tokenize",
    "decode",
    "export",
    "report",
    "inspect",
    "doctor",
]
IMAGE = "image/autoencoder_tiny_ksom"
HEAVY = ["torch", "numpy", "ray", "deepspeed", "fairseq2", "pydantic", "transformers", "matplotlib", "yaml"]


def tessera(*arguments):
    """The real command in a process of its own: exit code, standard output, standard error."""
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return result.returncode, result.stdout, result.stderr


def test_help_loads_no_library():
    code = (
        "import sys; sys.argv = ['tessera', '--help']\n"
        "from launch.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert command in result.stdout


def test_commands_are_listed_in_the_order_of_their_use():
    command = get_command(app)
    assert command.list_commands(Context(command)) == COMMANDS


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["prepare", "speech"], ["prepare", "images"]])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "speech/wav2vec2_tin"], "did you mean speech/wav2vec2_tiny?"),
        (["plan", IMAGE, "quantizer.cods=8"], "did you mean codes?"),
        (
            ["train", IMAGE, "--run", "never-made"],
            "data.path is missing: add data.path=FOLDER, a folder made by `tessera prepare images SOURCE FOLDER`",
        ),
        (
            ["train", IMAGE, "data.path=nowhere", "--run", "never-made"],
            "data set folder nowhere does not exist",
        ),
        (
            [
                "launch",
                IMAGE,
                "batch.micro_batches=6",
                "--run",
                "never-made",
                "--ranks-per-node",
                "4",
            ],
            "can't be shared by 4 ranks: use batch.micro_batches=4, 8 or 12, or 1, 2, 3 or 6 ranks",
        ),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["verify", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_request_that_cannot_be_carried_out_exits_2_and_says_why(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = tessera(*arguments)
    assert code == 2, errors
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [], "nothing half-made may stay"
