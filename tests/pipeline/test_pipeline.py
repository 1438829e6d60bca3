"""What `dvc repro` runs, what it writes, and what it says when it cannot go on."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from msgspec.structs import replace
from tercet.card import read_card

import models
from models.mnist.dataset import FULL, MIRROR
from pipeline.evaluate import TOLERANCE, compare, evaluate, with_onnxruntime, with_torch
from pipeline.export import Params as ExportParams
from pipeline.export import export, label, to_onnx
from pipeline.metrics import measure
from pipeline.prepare import prepare
from pipeline.stage import load_params, main, prepared
from pipeline.train import Params, build, fit, train
from tests.conftest import clone, edit_params, run
from tests.server.test_workers import until

TRAINED = ("train", "cross_validate", "export", "evaluate", "describe")  # the stages that settings and code of networks concern

every_model = pytest.mark.parametrize("name", models.names())
OWN = {"fizzbuzz_any": {"prove@fizzbuzz_any"}}  # the stages that only one model has, after those that all have


def rows_of(name: str) -> dict[str, np.ndarray]:
    """The prepared rows of a model."""
    with np.load(prepared(name)) as rows:
        return dict(rows)


@pytest.fixture
def trained(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace, to be read only; it is the working folder."""
    monkeypatch.chdir(workspace)
    return workspace


@pytest.fixture
def scratch(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace, to do anything with; it is the working folder."""
    copy = shutil.copytree(workspace, tmp_path / "scratch")
    monkeypatch.chdir(copy)
    return copy


def stages(output: str) -> set[str]:
    """The stages that `dvc repro` has run, or would run."""
    return set(re.findall(r"^Running stage '(.+)'", output, re.MULTILINE))


# What runs


def test_a_second_repro_runs_nothing(trained: Path) -> None:
    """With nothing changed, `dvc repro` runs no stage and leaves no trace."""
    output = run("dvc", "repro", cwd=trained).stdout
    assert stages(output) == set()
    assert "up to date" in output
    assert run("git", "status", "--porcelain", cwd=trained).stdout == ""


@every_model
def test_a_parameter_concerns_its_model_only(scratch: Path, name: str) -> None:
    """Another number of epochs runs all stages of that model but `prepare`, and touches no other model."""
    edit_params(scratch, **{f"{name}__train__epochs": 1})
    output = run("dvc", "repro", "--dry", "--force-downstream", cwd=scratch).stdout
    assert stages(output) == {f"{stage}@{name}" for stage in TRAINED} | OWN.get(name, set())


def test_a_network_concerns_all_that_runs_it(scratch: Path) -> None:
    """When the code of networks changes, every model is trained, exported and evaluated again, even to the same weights."""
    with (scratch / "models" / "network.py").open("a") as code:
        code.write("# changed\n")
    output = run("dvc", "repro", "--dry", cwd=scratch).stdout
    general = {f"{stage}@{name}" for stage in TRAINED[:-1] for name in models.names()}  # what a dry run can foresee
    assert stages(output) == general.union(*OWN.values())


def test_figures_and_curves_are_shown(trained: Path, tmp_path: Path) -> None:
    """`dvc metrics show` has every model's figures; `dvc plots show` its curves, confusion matrix and ROC."""
    shown = json.loads(run("dvc", "metrics", "show", "--json", cwd=trained).stdout)[""]["data"]
    run("dvc", "plots", "show", "-o", str(tmp_path), cwd=trained)
    page = (tmp_path / "index.html").read_text()
    for name in models.names():
        assert shown[f"models/{name}/metrics.json"]["data"] == json.loads((trained / f"models/{name}/metrics.json").read_text())
        for plot in (
            "plots/confusion.csv",
            "plots/roc.csv",
            "curves/plots/metrics/train/loss.tsv",
            "curves/plots/metrics/train/accuracy.tsv",
        ):
            assert f"models/{name}/{plot}" in page


def test_the_report_shows_every_model(trained: Path, tmp_path: Path) -> None:
    """`python -m pipeline.report` makes one page, without links elsewhere, of each model's figures, plots and misread digits."""
    copy = shutil.copytree(trained, tmp_path / "report")
    run(sys.executable, "-m", "pipeline.report", cwd=copy)
    page = (copy / "report.html").read_text()
    for name in models.names():
        assert f'<h2 id="{name}">' in page
    assert page.count("<svg") >= 5 * len(models.names()) + 1
    assert "misread: the answer" in page
    assert not re.search(r"""(src|href)=["']http""", re.sub(r"<metadata>.*?</metadata>", "", page, flags=re.DOTALL))


def test_the_live_report_follows_the_curves(trained: Path, tmp_path: Path) -> None:
    """`--live` draws what is there, and draws again when a point is added to a curve; the page loads itself anew."""
    copy = shutil.copytree(trained, tmp_path / "live")
    page, curve = copy / "report.html", copy / "models/fizzbuzz/curves/plots/metrics/train/loss.tsv"
    with subprocess.Popen([sys.executable, "-m", "pipeline.report", "--live"], cwd=copy, stdout=subprocess.DEVNULL) as process:
        try:
            first = until(lambda: page.is_file() and page.read_text())
            assert 'http-equiv="refresh"' in first
            assert first.count("<svg") == 2 * len(models.names())
            curve.write_text(f"{curve.read_text()}201\t0.1\n")
            until(lambda: page.read_text() != first)
        finally:
            process.terminate()


# What is written


@every_model
def test_both_files_give_the_answers_of_the_card(trained: Path, name: str) -> None:
    """model.pt and model.onnx have the checksums in the card, and give the answers that it shows for its example rows."""
    card = read_card(trained / "models" / name)
    expected = [example.output for example in card.examples]
    for file, answer in (("model.pt", with_torch), ("model.onnx", with_onnxruntime)):
        assert hashlib.sha256((trained / "models" / name / file).read_bytes()).hexdigest() == card.files[file]
        np.testing.assert_allclose(answer(name, card.example_rows()), expected, rtol=0, atol=TOLERANCE)
    assert {example.target for example in card.examples} == set(card.labels)


def test_the_card_tells_how_far_to_trust_the_model(trained: Path) -> None:
    """The diabetes card has the figures of the cross-validation, its use and a warning; `tercet models NAME` prints these."""
    card = read_card(trained / "models" / "diabetes")
    found = json.loads((trained / "models" / "diabetes" / "cross_validation.json").read_text())
    assert {"rows", "chosen_by", "auc", "log_loss", "brier", "accuracy", "ece"} <= set(card.cross_validation)
    assert card.cross_validation["auc"] == found["models"]["served"]["auc"]
    assert "no basis for a diagnosis" in card.warning
    told = run("tercet", "models", "diabetes", cwd=trained, COLUMNS="200").stdout
    assert card.warning in told
    assert card.intended_use in told


@every_model
def test_the_onnx_file_stands_alone(trained: Path, name: str) -> None:
    """It loads without any other file, takes any batch, and comes out the same, byte for byte, when exported again."""
    content = (trained / "models" / name / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    contract, rows = models.load(name, "contract").CONTRACT, rows_of(name)["test_inputs"]
    for batch in (1, 2, 7, 1000):
        asked = {contract.input.name: np.resize(rows, (batch, *contract.input.shape))}
        assert session.run([contract.output.name], asked)[0].shape == (batch, *contract.output.shape)

    network = build(name, load_params(name, "train", Params).network).eval()
    network.load_state_dict(torch.load(trained / "models" / name / "model.pt", weights_only=True))
    again = to_onnx(network, contract, torch.from_numpy(rows[:2]), load_params(name, "export", ExportParams).opset)
    card = msgspec.json.decode((trained / "models" / name / "card.json").read_bytes())
    label(again, card)
    assert again.SerializeToString(deterministic=True) == content
    facts = {fact.key: fact.value for fact in onnx.load_from_string(content).metadata_props}
    assert facts["git_commit"] == card["git_commit"]
    assert facts["data_sha256"] == hashlib.sha256(prepared(name).read_bytes()).hexdigest()
    assert json.loads(facts["labels"]) == list(contract.labels)
    assert json.loads(facts["units"]) == {feature.name: feature.unit for feature in contract.input.features}
    assert json.loads(facts["metrics"]) == card["metrics"]


@every_model
def test_a_seed_fixes_the_training(scratch: Path, name: str) -> None:
    """Trained twice with one seed on a CPU, a network has the same weights; with another seed, others, unless they were solved."""
    rows, weights = rows_of(name), []
    for seed in (0, 0, 1):
        edit_params(scratch, **{f"{name}__train__device": "cpu", f"{name}__train__seed": seed})
        params = load_params(name, "train", Params)
        params = replace(params, epochs=min(params.epochs, 1))
        network = fit(name, rows["train_inputs"][:256], rows["train_targets"][:256], params)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2]) == (params.epochs == 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@every_model
def test_training_on_a_gpu_passes_the_gates(scratch: Path, name: str) -> None:
    """A network trained on CUDA comes back to the CPU and is as accurate as the one that the workspace trained."""
    edit_params(scratch, **{f"{name}__train__device": "cuda"})
    rows = rows_of(name)
    network = fit(name, rows["train_inputs"], rows["train_targets"], load_params(name, "train", Params))
    with torch.inference_mode():
        answers = network(torch.from_numpy(rows["test_inputs"])).numpy()
    known = json.loads((scratch / "models" / name / "metrics.json").read_text())["accuracy"]
    assert measure(answers, rows["test_targets"])["accuracy"] == pytest.approx(known, abs=0.05)


# What is refused


def refusal(stage: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a stage says when it cannot go on: sys.exit prints one sentence and ends with code 1, without a traceback."""
    monkeypatch.setattr(sys, "argv", [stage.__name__, name])
    with pytest.raises(SystemExit) as stopped:
        main(stage)
    sentence = stopped.value.code
    assert isinstance(sentence, str)
    assert sentence.startswith(f"{stage.__name__} {name}: ")
    assert "\n" not in sentence
    return sentence


ANY = models.names()[0]


@pytest.mark.parametrize(
    ("stage", "entry", "value", "sentence"),
    [
        (train, "", {}, f"the entry models.{ANY}.train is missing"),
        (train, "__train__epoch", 3, "unknown field `epoch`"),
        (train, "__train__epochs", "many", "`$.epochs`"),
        (train, "__train__epochs", -1, "`$.epochs`"),
        (train, "__train__batch_size", 0, "`$.batch_size`"),
        (train, "__train__precision", "half", "'half' is not known; use float32 or bfloat16"),
        (train, "__train__device", "tpu", "'tpu' is not known; use auto, cpu or cuda"),
        (train, "__train__device", "cuda", "torch sees no GPU; use auto or cpu"),
        (train, "__train__optimizer__name", "Sgdd", "'Sgdd' is no optimiser of torch.optim; use SGD"),
        (train, "__train__optimizer__lrr", 1, "'lrr'"),
        (train, "__train__network", {"hiden": 1}, "'hiden'"),
        (prepare, "__prepare__sampel", 1, "'sampel'"),
        (export, "__export__opste", 1, "unknown field `opste`"),
        (evaluate, "__evaluate__gate", 5, "unknown field `gate`"),
        (evaluate, "__evaluate__gates", {}, "gates has no entry for the data set"),
    ],
)
def test_a_wrong_parameter_is_named(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, *, stage: Callable[[str], None], entry: str, value: object, sentence: str
) -> None:
    """A missing, unknown or impossible entry of params.yaml ends the stage with a sentence that names it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edit_params(scratch, **{ANY + entry: value})
    assert sentence in refusal(stage, ANY, monkeypatch)


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("stage", [prepare, train, export, evaluate])
def test_an_unknown_model_is_named(monkeypatch: pytest.MonkeyPatch, stage: Callable[[str], None]) -> None:
    """A model that is not there ends every stage with a sentence."""
    assert "models.nosuch is missing" in refusal(stage, "nosuch", monkeypatch)


@every_model
def test_a_missed_gate_is_named(scratch: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The sentence says which figure missed which bound; a gate that names no figure is refused too."""
    known = json.loads((scratch / "models" / name / "metrics.json").read_text())
    edit_params(scratch, **{f"{name}__evaluate": {"gates": {known["data"]: {"auc": 0, "accuracy": 1.5}}}})
    assert f"missed: accuracy is {known['accuracy']:.4f}, below its bound 1.5000" in refusal(evaluate, name, monkeypatch)
    edit_params(scratch, **{f"{name}__evaluate": {"gates": {known["data"]: {"acuracy": 0}}}})
    assert "gate 'acuracy' names no metric" in refusal(evaluate, name, monkeypatch)


def test_engines_that_disagree_are_refused() -> None:
    """A flipped label or a probability off by more than the tolerance fails, with the number; a smaller difference is reported."""
    ours, step = np.array([[0.9, 0.1], [0.5 + TOLERANCE / 4, 0.5 - TOLERANCE / 4]]), np.array([1, -1])
    assert compare(ours, ours + step * TOLERANCE / 2, classes=True) == {
        "label_flips": 0,
        "largest_difference": pytest.approx(TOLERANCE / 2),
    }
    with pytest.raises(Exception, match="different labels for 1 test rows, the first is row 1"):
        compare(ours, ours - step * TOLERANCE / 2, classes=True)
    with pytest.raises(Exception, match=f"differs by {2 * TOLERANCE:.2g} .* {TOLERANCE:g} is allowed"):
        compare(ours, ours + step * TOLERANCE * 2, classes=True)
    with pytest.raises(Exception, match="differs by nan"):
        compare(ours, np.vstack([ours[:1], [[np.nan, 0]]]), classes=True)


def test_a_damaged_mirror_stops_the_pipeline(tmp_path: Path) -> None:
    """`dvc repro` ends with the file and both checksums, and neither raw nor prepared digits are left behind."""
    fresh, damaged = clone(tmp_path / "fresh"), b"damaged"
    (tmp_path / "mirror").mkdir()
    for name in FULL:
        (tmp_path / "mirror" / f"{name}.gz").write_bytes(gzip.compress(damaged))
    ended = run("dvc", "repro", "prepare@mnist", cwd=fresh, check=False, **{MIRROR: str(tmp_path / "mirror")})
    name, expected = next(iter(FULL.items()))
    assert ended.returncode != 0
    assert f"{name}.gz is damaged: expected SHA-256 {expected}, found {hashlib.sha256(damaged).hexdigest()}" in ended.stdout
    assert "Traceback" not in ended.stdout
    assert [path for folder in ("raw", "prepared") for path in (fresh / "data" / folder).rglob("*") if path.is_file()] == []


@every_model
def test_a_page_says_what_the_card_says(trained: Path, name: str) -> None:
    """The page of a model has its description, warning, every unit and range, every figure and the hashes of its files."""
    card = json.loads((trained / "models" / name / "card.json").read_text())
    text = (trained / "docs" / "models" / f"{name}.md").read_text()
    for said in (card["description"], card["warning"], card["intended_use"], card["data"]["sha256"], card["git_commit"]):
        assert said in text
    for feature in card["input"]["features"]:
        assert f"| `{feature['name']}` | {feature['unit'] or '-'} | {feature['minimum']} to {feature['maximum']} |" in text
    for figure in card["metrics"]:
        assert figure == "rows" or f"| {figure.replace('_', ' ')} | " in text
    for file, digest in card["files"].items():
        assert f"| {file} | SHA-256 `{digest}` |" in text
