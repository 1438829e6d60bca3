"""The command `tercet`: exit codes, one-line errors, help, completion, and that it starts quickly."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tercet.cli.main import COMMANDS, load

from tests.cli.test_predict import ask
from tests.conftest import BIN, REPOSITORY, Service, run, serving

HEAVY = ("numpy", "grpc", "torch", "asyncio", "rich", "importlib.metadata")


@pytest.mark.parametrize("arguments", ["--help", "predict --help", "fizzbuzz --help", "health --help"])
def test_help_imports_nothing_heavy(arguments: str) -> None:
    """Help needs none of the packages that commands need when they run."""
    program = f"""
import sys
from tercet.cli.main import main
try:
    main({arguments.split()!r}, prog_name="tercet")
finally:
    print(*({HEAVY!r} & sys.modules.keys()), file=sys.stderr)
""".replace(f"{HEAVY!r}", f"set({HEAVY!r})")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: tercet" in done.stdout
    assert done.stderr.split() == []


@pytest.mark.slow
def test_a_prediction_imports_only_what_it_uses(default_service: Service) -> None:
    """A FizzBuzz prediction needs neither numpy nor rich, and nothing of the server."""
    program = f"""
import sys
from tercet.cli.main import main
try:
    main(["predict", "fizzbuzz", "15", "--server", "{default_service.address}"])
finally:
    unused = ("numpy", "rich", "msgspec")
    print(*(name for name in sys.modules if name in unused or name.startswith("tercet.server")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.split()) == ("fizzbuzz\n", [])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_is_true(name: str) -> None:
    """Each command is in a module of its name, and its summary is the one in the list."""
    command = load(name)
    assert (command.name, command.get_short_help_str(limit=80)) == (name, COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples(name: str) -> None:
    """`--help` of each command ends with examples of it, within 80 columns."""
    text = run("tercet", name, "--help", cwd=REPOSITORY, COLUMNS="80").stdout
    assert f"tercet {name}" in text.partition("Examples:\n")[2]
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nope", "Try `tercet --help`"),
        ("perdict", "No such command 'perdict'"),
        ("predict", "Try `tercet predict --help`"),
        ("predict mnist a.png --server localhost", "expected HOST:PORT, got 'localhost'"),
        ("predict mnist a.png --tls-key README.md", "go together"),
        ("serve --port 80000", "80000"),
        ("serve --port abc", "'abc' is not a valid integer"),
        ("serve --engine tensorrt", "not one of 'onnxruntime', 'torch'"),
        ("serve --tls-key README.md", "--tls-certificate"),
    ],
)
def test_a_wrong_command_line_exits_with_2(arguments: str, message: str) -> None:
    """Whatever is wrong with a command line, the exit code is 2 and one line says what."""
    done = run("tercet", *arguments.split(), cwd=REPOSITORY, check=False)
    assert message in done.stdout
    assert (done.returncode, done.stdout.count("\n"), done.stdout.startswith("tercet: ")) == (2, 1, True)


def test_no_service_is_answered_with_a_hint() -> None:
    """When nothing listens, the command explains how to start a service, and exits with 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("tercet", "fizzbuzz", "1", "3", cwd=REPOSITORY, check=False, TERCET_SERVER=address)
    assert done.returncode == 3
    assert "tercet serve" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_wrong_token_exits_with_4(workspace: Path, tmp_path: Path) -> None:
    """Without the token that the service requires the exit code is 4; with it, the command works."""
    (tmp_path / "tokens").write_text("secret\n")
    with serving(workspace / "models", "--token-file", str(tmp_path / "tokens")) as service:
        assert "UNAUTHENTICATED" in ask(service, "predict", "fizzbuzz", "3", status=4)
        assert ask(service, "predict", "fizzbuzz", "3", "--token", "secret") == "fizz\n"


@pytest.mark.slow
def test_a_closed_pipe_exits_with_141(default_service: Service) -> None:
    """When the reader of a pipe ends, so does the command, silently and with 141; a full disk is an error."""
    command = [str(BIN / "tercet"), "fizzbuzz", "1", "1000000", "--server", default_service.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "1\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "tercet: No space left on device\n")


@pytest.mark.slow
def test_ctrl_c_exits_with_130(default_service: Service) -> None:
    """SIGINT ends a command without a traceback."""
    command = [str(BIN / "tercet"), "fizzbuzz", "1", "9000000000", "--server", default_service.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert (process.wait(60), process.stderr.read()) == (130, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("tercet pre", ["plain,predict"]),
        ("tercet predict fizz", ["plain,fizzbuzz", "plain,fizzbuzz_any"]),
        ("tercet models mni", ["plain,mnist"]),
        ("tercet predict mnist exam", ["file,exam"]),
        ("tercet predict diabetes --input exam", ["file,exam"]),
        ("tercet predict diabetes --output c", ["plain,csv"]),
    ],
)
def test_completion(workspace: Path, words: str, completed: list[str]) -> None:
    """A shell completes commands, trained models, files and choices."""
    last = str(len(words.split()) - 1)
    done = run("tercet", cwd=workspace, _TERCET_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=last)
    assert done.stdout.splitlines() == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(tmp_path: Path, shell: str) -> None:
    """Click's variable prints the script of each shell, and bash accepts it."""
    script = run("tercet", cwd=tmp_path, _TERCET_COMPLETE=f"{shell}_source").stdout
    assert "_tercet_completion" in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        assert "_tercet_completion" in run("bash", "-c", ". ./script; complete -p tercet", cwd=tmp_path).stdout
