"""The command line: answers that a person reads, files in and out, errors that are one sentence, codes for scripts."""

import csv
import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from tercet.cli.render import bar, histogram
from tercet.client import MEASUREMENTS

from tests.conftest import BIN, REPOSITORY, Service, run, serving

SEVEN = REPOSITORY / "examples" / "seven.png"


def ask(service: Service, *arguments: str, status: int = 0, cwd: Path = REPOSITORY, **environment: str) -> str:
    """What `tercet` prints, asked of a service; it must exit with `status`."""
    done = run("tercet", *arguments, cwd=cwd, check=False, TERCET_SERVER=service.address, **environment)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("predict mnist nowhere.png", 1, "nowhere.png cannot be read"),
        ("predict mnist nowhere/*.png", 1, "'nowhere/*.png' matches no file"),
        ("predict mnist README.md", 1, "README.md: "),
        ("predict diabetes glucose=high", 1, "glucose='high' is no number"),
        ("predict diabetes height=180", 1, "names no measurement"),
        ("predict diabetes glucose=1 glu=2", 1, "glucose_mg_per_dl is given twice"),
        ("predict diabetes 1 2 3", 1, f"give {len(MEASUREMENTS)} in the order"),
        ("predict diabetes glucose=-1", 1, "glucose_mg_per_dl must be 0 to 1000"),
        ("predict fizzbuzz 2.5", 1, "no whole number"),
        ("predict fizzbuzz 9223372036854775808", 1, "no whole number of 64 bits"),
        ("predict fizzbuzz_any [[1]]", 1, "the shape is [1, 1]; [-1] is right"),
        ("predict fizzbuzz_any [null]", 1, "takes no such row"),
        ("predict fizzbuzz_any 7", 1, "no batch of rows"),
        ("predict fizzbuzz_any seven", 1, "'seven' is no JSON"),
        ("predict tulips [[1]]", 1, "there is no model 'tulips'"),
        ("fizzbuzz 1 9 0", 1, "step"),
        ("models nowhere", 1, "card.json is missing"),
        ("predict fizzbuzz", 2, "either values or --input"),
        ("predict fizzbuzz 1 --input README.md", 2, "either values or --input"),
        ("predict fizzbuzz 1 --ouput csv", 2, "Did you mean"),
        ("predict fizzbuzz 1 --draw", 2, "the pictures of mnist"),
        ("predict fizzbuzz --input nowhere.csv", 2, "'nowhere.csv': No such file"),
        ("predict", 2, "Try `tercet predict --help`"),
        ("--nope", 2, "Try `tercet --help`"),
    ],
)
def test_errors_are_one_sentence(default_service: Service, arguments: str, status: int, sentence: str) -> None:
    """What cannot be answered ends with its exit code and one line that says why."""
    printed = ask(default_service, *arguments.split(), status=status)
    assert sentence in printed
    assert printed.startswith("tercet: ")
    assert printed.count("\n") == 1


def test_no_service_is_answered_with_a_hint() -> None:
    """When nothing listens, the command says how to start a service, and exits with 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening: nobody else gets the port
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("tercet", "fizzbuzz", "1", "3", cwd=REPOSITORY, check=False, TERCET_SERVER=address)
    assert done.returncode == 3
    assert "tercet serve" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_wrong_token_exits_with_4(workspace: Path, tmp_path: Path) -> None:
    """A caller without the token that the service wants learns so from the exit code; with it, all is well."""
    (tmp_path / "tokens").write_text("secret\n")
    with serving(workspace / "models", "--token-file", str(tmp_path / "tokens")) as service:
        assert "UNAUTHENTICATED" in ask(service, "predict", "fizzbuzz", "3", status=4)
        assert ask(service, "predict", "fizzbuzz", "3", "--token", "secret") == "fizz\n"


def test_output_that_nobody_reads_ends_the_command(default_service: Service) -> None:
    """When the reader of a pipe ends, so does the command, without a word and with 141; a full disk is a sentence."""
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


def test_json_is_one_line_an_answer(default_service: Service) -> None:
    """`--json` prints what a program reads, also for a model asked over the Open Inference Protocol."""
    printed = ask(default_service, "predict", "fizzbuzz", "15", "16", "--json").splitlines()
    assert [json.loads(line) for line in printed] == [{"number": 15, "word": "fizzbuzz"}, {"number": 16, "word": "16"}]
    [line] = ask(default_service, "predict", "fizzbuzz_any", "[15]", "--json").splitlines()
    assert json.loads(line)["output"][3] > 0.99


def test_measurements_may_be_shortened_or_left_out(default_service: Service) -> None:
    """Names and positions say the same, and so do all formats of a file."""
    named = ask(default_service, "predict", "diabetes", "glu=148", "age=50")
    assert named == ask(default_service, "predict", "diabetes", "-", "148", *"-----", "50")
    assert "positive test" in named


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("patients.csv", "\ufeffglu, age,bmi\r\n148,50,\r\n\r\n85,31,26.6\r\n"),
        ("patients.jsonl", '{"glucose": 148, "age": 50, "bmi": null}\n["-", 85, "", null, null, 26.6, null, 31]\n'),
        ("patients.txt", "glu=148 age=50\n\n- 85 - - - 26.6 - 31\n"),
    ],
)
def test_a_file_says_what_arguments_say(default_service: Service, tmp_path: Path, name: str, text: str) -> None:
    """Patients of a CSV file as a spreadsheet writes it, of JSON lines and of plain lines get the answers of single ones."""
    (tmp_path / name).write_text(text, newline="")
    single = [ask(default_service, "predict", "diabetes", *words.split()) for words in ("glu=148 age=50", "glu=85 age=31 bmi=26.6")]
    assert ask(default_service, "predict", "diabetes", "--input", str(tmp_path / name)) == "".join(single)


def test_pictures_are_found_by_pattern_list_and_stdin(default_service: Service, tmp_path: Path) -> None:
    """A pattern, also into folders, a list of names and a picture on stdin lead to the same digit; CSV has its probabilities."""
    (tmp_path / "more").mkdir()
    for name in ("a.png", "more/b [1].png"):
        (tmp_path / name).write_bytes(SEVEN.read_bytes())
    (tmp_path / "list.csv").write_text('file\na.png\n"more/b [1].png"\n')
    for source in (["**/*.png"], ["a.png", "more/b [1].png"], ["--input", "list.csv"]):
        printed = ask(default_service, "predict", "mnist", *source, cwd=tmp_path)
        assert re.fullmatch(r"a\.png: 7 \(.*%\)\nmore/b \[1\]\.png: 7 \(.*%\)\n", printed)
    [row] = csv.DictReader(ask(default_service, "predict", "mnist", "a.png", "--output", "csv", cwd=tmp_path).splitlines())
    assert (row["file"], row["digit"]) == ("a.png", "7")
    assert sum(float(row[f"probabilities_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-5)
    with SEVEN.open("rb") as picture:
        command = [str(BIN / "tercet"), "predict", "mnist", "-", "--server", default_service.address]
        assert subprocess.run(command, stdin=picture, capture_output=True, check=True).stdout.startswith(b"-: 7 ")


def test_a_picture_that_is_too_large_is_named(default_service: Service, tmp_path: Path) -> None:
    """A file larger than any message is refused as such, with exit code 1: to try again later does not help."""
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**24 + 1)
    said = ask(default_service, "predict", "mnist", "large.png", status=1, cwd=tmp_path)
    assert said.startswith("tercet: large.png: Received message larger than max")


def test_drawn_is_what_the_model_sees(default_service: Service) -> None:
    """`--draw` shows 28 x 28 pixels in 14 lines, and a bar for each digit beside them."""
    head, *lines = ask(default_service, "predict", "mnist", str(SEVEN), "--draw").splitlines()
    assert len(lines) == 14
    assert any("█" in line[:28] for line in lines)
    bars = [line[30:].split() for line in lines if "%" in line]
    assert [words[0] for words in bars] == list("0123456789")
    assert bars[7][-1] == "<-"
    assert f"({bars[7][-2]})" in head


@pytest.mark.parametrize(
    ("model", "name", "text", "answered", "sentence"),
    [
        ("diabetes", "p.csv", "glucose,bmi\n148,33.6\n85,x\n1,2\n", 1, "line 3: bmi='x' is no number"),
        ("diabetes", "p.csv", "glucose,bmi\n148,33.6\n85,336\n1,2\n", 1, "line 3: bmi_kg_per_m2 must be 0 to 150 kg/m²"),
        ("diabetes", "p.csv", "glucose,bmi\n148,33.6\n85\n", 1, "line 3: the header has 2 columns, and this row more or fewer"),
        ("diabetes", "p.csv", 'glucose,bmi\n148,33.6\n85,"1\n', 1, "line 3: unexpected end of data"),
        ("diabetes", "p.csv", "glucose,glucose\n1,2\n", 0, "line 1: two columns have one name"),
        ("diabetes", "p.csv", "glucose;bmi\n1;2\n", 0, "line 2: 'glucose;bmi' names no measurement"),
        ("diabetes", "p.jsonl", '{"bmi": 33}\n{"bmi": true}\n', 1, "line 2: bmi=True is no number"),
        ("diabetes", "p.jsonl", '{"bmi": 33}\n{"bmi"}\n', 1, "line 2: '{\"bmi\"}' is no JSON"),
        ("fizzbuzz", "n.csv", "n\n3\n", 0, "line 2: there is no column 'number'; there are 'n'"),
        ("fizzbuzz", "n.jsonl", "3\n5.0\n", 1, "line 2: 5.0 is no whole number"),
        ("fizzbuzz", "n.txt", "3\n\n5x\n", 1, "line 3: '5x' is no whole number"),
        ("fizzbuzz_any", "n.txt", "3\n[1]\n5\n", 1, "line 2: 'fizzbuzz_any' takes no such row: inputs[0]: the shape is [1, 1]"),
        ("fizzbuzz_any", "n.csv", "number\n3\n", 0, "line 2: columns mean nothing to 'fizzbuzz_any'"),
        ("mnist", "list.txt", f"{SEVEN}\n/dev/null\n", 1, "line 2: /dev/null: not a readable PNG or JPEG image"),
        ("mnist", "list.txt", f"{SEVEN}\nnowhere.png\n", 1, "line 2: nowhere.png cannot be read"),
    ],
)
def test_a_wrong_line_is_named(
    default_service: Service, tmp_path: Path, model: str, name: str, text: str, answered: int, sentence: str
) -> None:
    """The first line that is wrong, found here or by the service, ends a file with its place; the lines before are answered."""
    (tmp_path / name).write_text(text)
    *answers, last = ask(default_service, "predict", model, "--input", name, status=1, cwd=tmp_path).splitlines()
    assert last.startswith(f"tercet: {name}, {sentence}")
    assert len(answers) == answered


def test_no_text_is_refused(default_service: Service, tmp_path: Path) -> None:
    """A file that is no UTF-8 is refused in a sentence."""
    (tmp_path / "patients.csv").write_bytes("größe\n".encode("latin-1"))
    said = ask(default_service, "predict", "diabetes", "--input", "patients.csv", status=1, cwd=tmp_path)
    assert said == "tercet: patients.csv, line 1: no text in UTF-8; save it as such\n"


def test_input_is_read_as_it_is_needed(default_service: Service) -> None:
    """Answers come while the input pauses, and in the end there are as many as there were lines."""
    command = [str(BIN / "tercet"), "predict", "fizzbuzz", "--input", "-", "--format", "csv", "--output", "csv"]
    command += ["--server", default_service.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("number\n1\n2\n3\n")
        process.stdin.flush()
        assert [process.stdout.readline() for _ in range(4)] == ["number,word\n", "1,1\n", "2,2\n", "3,fizz\n"]
        process.stdin.write("".join(f"{n}\n" for n in range(4, 20001)))
        process.stdin.close()
        assert len(process.stdout.read().splitlines()) == 19997
        assert process.wait(60) == 0


def test_a_service_that_takes_little_is_asked_in_parts(workspace: Path, tmp_path: Path) -> None:
    """When a chunk has more rows than the service takes, it is asked in smaller ones, and the order stays."""
    (tmp_path / "numbers").write_text("".join(f"{n}\n" for n in range(300)))
    with serving(workspace / "models", "--max-request-rows", "7") as service:
        printed = ask(service, "predict", "fizzbuzz_any", "--input", str(tmp_path / "numbers"), "--json").splitlines()
    labels = [max(range(4), key=json.loads(line)["output"].__getitem__) for line in printed]
    assert labels == [(n % 3 == 0) + 2 * (n % 5 == 0) for n in range(300)]


def test_models_lists_what_is_trained(workspace: Path) -> None:
    """`tercet models` is an aligned table of 80 columns at most, which says what is not trained; `--json` has the cards."""
    (workspace / "models" / "untrained").mkdir()
    (workspace / "models" / "untrained" / "contract.py").touch()
    try:
        head, *lines = run("tercet", "models", cwd=workspace).stdout.splitlines()
        cards = [json.loads(line) for line in run("tercet", "models", "--json", cwd=workspace).stdout.splitlines()]
    finally:
        (workspace / "models" / "untrained" / "contract.py").unlink()
        (workspace / "models" / "untrained").rmdir()
    start = head.index("LABELS")
    labels = {line.split()[0]: line[start : head.index("FIGURE")].strip() for line in lines}
    assert labels["diabetes"] == "negative, positive"
    assert labels["mnist"] == "0 .. 9"
    assert "not trained" in next(line for line in lines if line.startswith("untrained"))
    assert max(map(len, lines)) <= 80
    assert {card["name"]: card.get("labels") for card in cards}["untrained"] is None
    assert next(card for card in cards if card["name"] == "diabetes")["input"]["features"][5]["unit"] == "kg/m²"


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_serve_announces_what_runs(workspace: Path, tmp_path: Path, engine: str, workers: str) -> None:
    """At its start the service says what runs each model, in how many processes, and what to try; what it says to try works."""
    (tmp_path / "tokens").write_text("TOKEN\n")
    flags = ("--workers", workers, "--token-file", str(tmp_path / "tokens"))
    with serving(workspace / "models", *flags, engine=engine) as service:
        assert service.process.stdout
        lines = list(iter(service.process.stdout.readline, "  tercet fizzbuzz 1 30\n"))
        tried = [line.strip() for line in lines[lines.index("try:\n") + 1 :]]
        assert f"export TERCET_SERVER={service.address}" in tried
        run("sh", "-ec", "\n".join(tried), cwd=workspace)
    assert [line.split()[0] for line in lines if f" {engine} " in line and line.endswith((" on cpu\n", " on cuda\n"))] == [
        "diabetes",
        "fizzbuzz",
        "fizzbuzz_any",
        "mnist",
    ]
    assert ("each in 2 processes\n" in lines) == (workers == "2")


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
    """A shell is told commands, models of the folder, files and choices."""
    last = str(len(words.split()) - 1)
    done = run("tercet", cwd=workspace, _TERCET_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=last)
    assert done.stdout.splitlines() == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(tmp_path: Path, shell: str) -> None:
    """Each shell gets its own script, the same that click's variable prints; bash takes it."""
    script = run("tercet", "completion", shell, cwd=tmp_path).stdout
    assert script == run("tercet", cwd=tmp_path, _TERCET_COMPLETE=f"{shell}_source").stdout
    assert "_tercet_completion" in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        assert "_tercet_completion" in run("bash", "-c", ". ./script; complete -p tercet", cwd=tmp_path).stdout


def test_every_command_has_examples() -> None:
    """`--help` of each command ends with examples that begin with its name, within 80 columns."""
    listed = run("tercet", "--help", cwd=REPOSITORY, COLUMNS="80").stdout.partition("Commands:\n")[2]
    for command in (line.split()[0] for line in listed.splitlines()):
        said = run("tercet", command, "--help", cwd=REPOSITORY, COLUMNS="80").stdout
        assert f"tercet {command}" in said.partition("Examples:\n")[2]
        assert max(map(len, said.splitlines())) <= 80


def test_a_bar_has_eighths() -> None:
    """A share of one becomes a bar of that length, padded to its width."""
    assert [bar(share, 4) for share in (0, 1 / 32, 0.5, 1)] == ["    ", "▏   ", "██  ", "████"]


def test_a_histogram_has_steps_of_1_2_5() -> None:
    """Every value is counted in its step, empty steps between others too."""
    import numpy as np  # noqa: PLC0415

    lines = histogram(np.array([0.15, 3.0, 4.0])).splitlines()
    assert [(line.split()[0], line.split()[2], line.split()[-1]) for line in lines] == [
        ("0.1", "0.2", "1"),
        ("0.2", "0.5", "0"),
        ("0.5", "1", "0"),
        ("1", "2", "0"),
        ("2", "5", "2"),
    ]


def test_serving_without_its_packages_says_what_to_install(workspace: Path, tmp_path: Path) -> None:
    """Where only a client is installed, `tercet serve` ends in one sentence."""
    (tmp_path / "uvloop.py").write_text("raise ImportError('not installed')\n")
    done = run("tercet", "serve", "--port", "0", cwd=workspace, check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: serving needs more packages: pip install 'tercet[serve]' (not installed)"]
