"""`tercet predict`: input in every form, output for people and programs, and errors that name their place."""

import csv
import json
import re
import subprocess
from pathlib import Path

import pytest
from tercet.client import MEASUREMENTS

from tests.conftest import BIN, REPOSITORY, Service, run, serving

pytestmark = pytest.mark.slow
SEVEN = REPOSITORY / "examples" / "seven.png"
NOTICE = "tercet: for teaching and benchmarking only, not for medical decisions\n"


def ask(service: Service, *arguments: str, status: int = 0, cwd: Path = REPOSITORY, **environment: str) -> str:
    """What `tercet` prints when it asks a service; it must exit with `status`."""
    done = run("tercet", *arguments, cwd=cwd, check=False, TERCET_SERVER=service.address, **environment)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("predict mnist nowhere.png", 1, "cannot read nowhere.png"),
        ("predict mnist nowhere/*.png", 1, "no file matches 'nowhere/*.png'"),
        ("predict mnist README.md", 1, "README.md: "),
        ("predict diabetes glucose=high", 1, "glucose: expected a number, got 'high'"),
        ("predict diabetes height=180", 1, "unknown measurement 'height'"),
        ("predict diabetes glucose=1 glu=2", 1, "glucose_mg_per_dl is given twice"),
        ("predict diabetes 1 2 3", 1, f"{len(MEASUREMENTS)} values in the order"),
        ("predict diabetes glucose=-1", 1, "0 to 1000"),
        ("predict fizzbuzz 2.5", 1, "expected a 64-bit integer, got '2.5'"),
        ("predict fizzbuzz 9223372036854775808", 1, "expected a 64-bit integer"),
        ("predict fizzbuzz_any [[1]]", 1, "expected INT64 of shape [], got int64 of shape [1]"),
        ("predict fizzbuzz_any [null]", 1, "expected INT64 of shape [], got object"),
        ("predict fizzbuzz_any 7", 1, "expected a JSON list of rows"),
        ("predict fizzbuzz_any seven", 1, "expected JSON, got 'seven'"),
        ("predict tulips [[1]]", 1, "No model 'tulips'. Expected one of: diabetes, fizzbuzz"),
        ("fizzbuzz 1 9 0", 1, "step"),
        ("predict minst seven.png", 1, "No model 'minst'. Did you mean 'mnist'?"),
        ("predict fizzbuzz", 2, "either values or --input"),
        ("predict fizzbuzz 1 --input README.md", 2, "either values or --input"),
        ("predict fizzbuzz 1 --ouput csv", 2, "Did you mean"),
        ("predict fizzbuzz 1 --draw", 2, "--draw is for pictures of mnist"),
        ("predict fizzbuzz --input nowhere.csv", 2, "'nowhere.csv': No such file"),
    ],
)
def test_errors_are_one_line(default_service: Service, arguments: str, status: int, message: str) -> None:
    """What cannot be predicted ends with its exit code and one line that says why."""
    printed = ask(default_service, *arguments.split(), status=status)
    assert message in printed
    assert printed.startswith("tercet: ")
    assert printed.count("\n") == 1


def test_json_is_one_line_per_prediction(default_service: Service) -> None:
    """`--json` prints an object per prediction, also for a model without a typed service."""
    printed = ask(default_service, "predict", "fizzbuzz", "15", "16", "--json").splitlines()
    assert [json.loads(line) for line in printed] == [{"number": 15, "word": "fizzbuzz"}, {"number": 16, "word": "16"}]
    [line] = ask(default_service, "predict", "fizzbuzz_any", "[15]", "--json").splitlines()
    assert json.loads(line)["output"][3] > 0.99


def test_measurements_may_be_shortened_or_left_out(default_service: Service) -> None:
    """Short names and positions give the same prediction, with one notice on stderr."""
    named = ask(default_service, "predict", "diabetes", "glu=148", "age=50")
    assert named == ask(default_service, "predict", "diabetes", "-", "148", *"-----", "50")
    assert re.fullmatch(NOTICE + r"\d+\.\d% probability of a positive test \((positive|negative)\)\n", named)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("patients.csv", "\ufeffglu, age,bmi\r\n148,50,\r\n\r\n85,31,26.6\r\n"),
        ("patients.jsonl", '{"glucose": 148, "age": 50, "bmi": null}\n["-", 85, "", null, null, 26.6, null, 31]\n'),
        ("patients.txt", "glu=148 age=50\n\n- 85 - - - 26.6 - 31\n"),
    ],
)
def test_every_format_of_a_file_gives_the_same_predictions(default_service: Service, tmp_path: Path, name: str, text: str) -> None:
    """CSV as a spreadsheet writes it, JSON lines and plain lines give the predictions that arguments give."""
    (tmp_path / name).write_text(text, newline="")
    single = [ask(default_service, "predict", "diabetes", *words.split()) for words in ("glu=148 age=50", "glu=85 age=31 bmi=26.6")]
    assert ask(default_service, "predict", "diabetes", "--input", str(tmp_path / name)) == "".join(
        [NOTICE, *(text.removeprefix(NOTICE) for text in single)]
    )


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
    """A picture larger than a message is named, with exit code 1, as trying again does not help."""
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**24 + 1)
    said = ask(default_service, "predict", "mnist", "large.png", status=1, cwd=tmp_path)
    assert said.startswith("tercet: large.png: Received message larger than max")


def test_drawn_is_what_the_model_sees(default_service: Service) -> None:
    """`--draw` shows 28 x 28 pixels in 14 lines, and a bar for each digit next to them."""
    head, *lines = ask(default_service, "predict", "mnist", str(SEVEN), "--draw").splitlines()
    assert len(lines) == 14
    assert any("█" in line[:28] for line in lines)
    bars = [line[30:].split() for line in lines if "%" in line]
    assert [words[0] for words in bars] == list("0123456789")
    assert bars[7][-1] == "<-"
    assert f"({bars[7][-2]})" in head


@pytest.mark.parametrize(
    ("model", "name", "text", "predicted", "message"),
    [
        ("diabetes", "p.csv", "glucose,bmi\n148,33.6\n85,x\n1,2\n", 1, "line 3: bmi: expected a number, got 'x'"),
        (
            "diabetes",
            "p.csv",
            "glucose,bmi\n148,33.6\n85,336\n1,2\n",
            1,
            "line 3: bmi_kg_per_m2 must be 0 to 150 kg/m², or NaN (not measured); got 336",
        ),
        ("diabetes", "p.csv", "glucose,bmi\n148,33.6\n85\n", 1, "line 3: expected 2 columns, as in the header"),
        ("diabetes", "p.csv", 'glucose,bmi\n148,33.6\n85,"1\n', 1, "line 3: unexpected end of data"),
        ("diabetes", "p.csv", "glucose,glucose\n1,2\n", 0, "line 1: two columns have the same name"),
        ("diabetes", "p.csv", "glucose;bmi\n1;2\n", 0, "line 2: unknown measurement 'glucose;bmi'"),
        ("diabetes", "p.jsonl", '{"bmi": 33}\n{"bmi": true}\n', 1, "line 2: bmi: expected a number, got True"),
        ("diabetes", "p.jsonl", '{"bmi": 33}\n{"bmi"}\n', 1, "line 2: expected JSON, got '{\"bmi\"}'"),
        ("fizzbuzz", "n.csv", "n\n3\n", 0, "line 2: expected a column 'number', got 'n'"),
        ("fizzbuzz", "n.jsonl", "3\n5.0\n", 1, "line 2: expected a 64-bit integer, got 5.0"),
        ("fizzbuzz", "n.txt", "3\n\n5x\n", 1, "line 3: expected a 64-bit integer, got '5x'"),
        ("fizzbuzz_any", "n.txt", "3\n[1]\n5\n", 1, "line 2: expected INT64 of shape [], got int64 of shape [1]"),
        ("fizzbuzz_any", "n.csv", "number\n3\n", 0, "line 2: expected a row such as [0.5, 1.0] per line"),
        ("mnist", "list.txt", f"{SEVEN}\n/dev/null\n", 1, "line 2: /dev/null: "),
        ("mnist", "list.txt", f"{SEVEN}\nnowhere.png\n", 1, "line 2: cannot read nowhere.png"),
    ],
)
def test_a_wrong_line_is_named(
    default_service: Service, tmp_path: Path, model: str, name: str, text: str, predicted: int, message: str
) -> None:
    """The first wrong line, found here or by the service, ends a file with its place; the lines before are predicted."""
    (tmp_path / name).write_text(text)
    printed = ask(default_service, "predict", model, "--input", name, status=1, cwd=tmp_path).removeprefix(NOTICE)
    *predictions, last = printed.splitlines()
    assert last.startswith(f"tercet: {name}, {message}")
    assert len(predictions) == predicted


def test_a_file_must_be_utf_8(default_service: Service, tmp_path: Path) -> None:
    """A file in another encoding is rejected."""
    (tmp_path / "patients.csv").write_bytes("größe\n".encode("latin-1"))
    printed = ask(default_service, "predict", "diabetes", "--input", "patients.csv", status=1, cwd=tmp_path)
    assert printed == "tercet: patients.csv, line 1: expected text in UTF-8\n"


def test_input_is_read_as_it_is_needed(default_service: Service) -> None:
    """Predictions are printed while the input pauses, and there are as many as lines in the end."""
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


def test_a_low_limit_of_rows_is_respected(workspace: Path, tmp_path: Path) -> None:
    """Input with more rows than the service accepts per request is predicted in order."""
    (tmp_path / "numbers").write_text("".join(f"{n}\n" for n in range(300)))
    with serving(workspace / "models", "--max-request-rows", "7") as service:
        printed = ask(service, "predict", "fizzbuzz_any", "--input", str(tmp_path / "numbers"), "--json").splitlines()
    labels = [max(range(4), key=json.loads(line)["output"].__getitem__) for line in printed]
    assert labels == [(n % 3 == 0) + 2 * (n % 5 == 0) for n in range(300)]
