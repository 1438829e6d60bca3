"""`dvc repro` runs the stages that are out of date, and `dvc metrics` and `dvc plots` show their results."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

import models
from models.mnist.dataset import FULL, MIRROR
from tests.conftest import REPOSITORY, clone, edit_params, run

pytestmark = pytest.mark.slow

TRAINED = ("train", "export", "evaluate", "describe")  # the stages of every model that depend on settings and networks
PLOTS = (
    "confusion.csv",
    "roc.csv",
    "calibration.csv",
    "training/plots/metrics/train/loss.tsv",
    "training/plots/metrics/train/accuracy.tsv",
)

SECTIONS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())["models"]

every_model = pytest.mark.parametrize("name", models.names())


def stages(output: str) -> set[str]:
    """The stages that `dvc repro` ran, or would run, from its output."""
    return set(re.findall(r"^Running stage '(.+)'", output, re.MULTILINE))


def optional(name: str) -> set[str]:
    """The stages that run only for models with such a section."""
    return {f"{stage}@{name}" for stage in ("cross_validate", "prove") if stage in SECTIONS[name]}


def test_optional_stages_are_listed() -> None:
    """params.yaml lists the models that have a section `cross_validate` or `prove`."""
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    assert params["cross_validated"] == [name for name, sections in SECTIONS.items() if "cross_validate" in sections]
    assert params["proved"] == [name for name, sections in SECTIONS.items() if "prove" in sections]


def test_a_second_repro_runs_nothing(trained: Path) -> None:
    """With nothing changed, `dvc repro` runs no stage and leaves no trace."""
    output = run("dvc", "repro", cwd=trained).stdout
    assert stages(output) == set()
    assert "up to date" in output
    assert run("git", "status", "--porcelain", cwd=trained).stdout == ""


@every_model
def test_a_parameter_concerns_its_model_only(scratch: Path, name: str) -> None:
    """Another number of epochs runs all stages of that model except `prepare`, and none of another model."""
    edit_params(scratch, **{f"{name}__train__epochs": 1})
    output = run("dvc", "repro", "--dry", "--force-downstream", cwd=scratch).stdout
    assert stages(output) == {f"{stage}@{name}" for stage in TRAINED} | optional(name)


def test_a_network_concerns_all_that_runs_it(scratch: Path) -> None:
    """When the code of all networks changes, every model is trained, exported and evaluated again."""
    with (scratch / "models" / "network.py").open("a") as code:
        code.write("# changed\n")
    output = run("dvc", "repro", "--dry", cwd=scratch).stdout
    expected = {f"{stage}@{name}" for stage in TRAINED[:-1] for name in models.names()}  # a dry run stops before describe
    assert stages(output) == expected.union(*map(optional, models.names()))


def test_metrics_and_plots_are_shown(trained: Path, tmp_path: Path) -> None:
    """`dvc metrics show` has the metrics of every model; `dvc plots show` its tables that have rows, and the misread digits."""
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=trained).stdout)[""]["data"]
    run("dvc", "plots", "show", "-o", str(tmp_path), cwd=trained)
    page = (tmp_path / "index.html").read_text()
    for name in models.names():
        report = f"models/{name}/report"
        assert shown[f"{report}/metrics.json"]["data"] == json.loads((trained / report / "metrics.json").read_text())
        for plot in PLOTS:
            learned = SECTIONS[name]["train"]["epochs"] or "training" not in plot
            assert (f"{report}/{plot}" in page) == bool(learned)
    assert "models/diabetes/report/training/calibration.csv" in page
    assert (tmp_path / "static" / "workspace_models_mnist_report_misread_misread.png").stat().st_size > 1000


@pytest.mark.usefixtures("trained")
def test_reports_are_not_empty() -> None:
    """Only models that are cross-validated or proved have such a report, and only MNIST has an image of misread rows."""
    for file, name in (
        ("training/cross_validation.json", "diabetes"),
        ("proof.json", "fizzbuzz_any"),
        ("misread/misread.png", "mnist"),
    ):
        assert [path.parts[1] for path in Path("models").glob(f"*/report/{file}")] == [name]


def test_a_damaged_mirror_stops_the_pipeline(tmp_path: Path) -> None:
    """`dvc repro` fails with the file and both checksums, and leaves no raw or prepared digits behind."""
    fresh, damaged = clone(tmp_path / "fresh"), b"damaged"
    (tmp_path / "mirror").mkdir()
    for name in FULL:
        (tmp_path / "mirror" / f"{name}.gz").write_bytes(gzip.compress(damaged))
    ended = run("dvc", "repro", "prepare@mnist", cwd=fresh, check=False, **{MIRROR: str(tmp_path / "mirror")})
    name, expected = next(iter(FULL.items()))
    assert ended.returncode != 0
    assert f"{name}.gz is damaged: expected SHA-256 {expected}, got {hashlib.sha256(damaged).hexdigest()}" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert [path for folder in ("raw", "prepared") for path in (fresh / "data" / folder).rglob("*") if path.is_file()] == []
