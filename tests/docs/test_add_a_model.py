"""docs/add-a-model.md is true: its code runs, and what it adds is a model like the others."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tercet.card import read_card
from tercet.client import Client

from pipeline.evaluate import TOLERANCE
from tests.conftest import REPOSITORY, run, serving
from tests.pipeline.test_pipeline import stages

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (REPOSITORY / "docs/add-a-model.md").read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return [body for name, body in BLOCKS if name == language]


def files() -> dict[str, str]:
    """The blocks that begin with the name of a file, by that name."""
    return {name: body for body in blocks("python") if (name := body.partition("\n")[0].removeprefix("# ")).endswith(".py")}


@pytest.fixture(scope="module")
def folder(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained clone to which the model of the tutorial was added as it says."""
    copy = Path(shutil.copytree(workspace, tmp_path_factory.mktemp("tutorial") / "tercet"))
    for name, body in files().items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(body)
    with (copy / "params.yaml").open("a") as params:
        params.writelines(blocks("yaml"))
    return copy


def test_the_lesson_learns() -> None:
    """The three steps run one after the other, and all end where the page says."""
    found: dict[str, float] = {}
    for body in blocks("python"):
        if body not in files().values():
            exec(body, found)  # noqa: S102  it is our own page
    assert max(found["by_hand"], found["by_autograd"], found["by_optimizer"]) < 0.001


def test_the_model_is_trained_and_served(folder: Path, tmp_path: Path) -> None:
    """It alone is trained, its model.onnx and card.json alone are served, and either engine gives its card's answers."""
    output = "".join(run("sh", "-c", command, cwd=folder).stdout for block in blocks("sh") for command in block.splitlines())
    assert stages(output) == {
        f"{stage}@lesson" for stage in ("prepare", "train", "cross_validate", "export", "evaluate", "describe")
    }

    home = folder / "models" / "lesson"
    alone = tmp_path / "served" / "lesson"
    alone.mkdir(parents=True)
    for file in ("model.onnx", "card.json"):
        shutil.copyfile(home / file, alone / file)
    card = read_card(home)
    for place, engine, environment in ((alone, "onnxruntime", {}), (home, "torch", {"PYTHONPATH": str(folder)})):
        with serving(place.parent, engine=engine, **environment) as service, Client(service.address) as client:
            expected = [example.output for example in card.examples]
            np.testing.assert_allclose(client.infer("lesson", card.example_rows()), expected, rtol=TOLERANCE, atol=TOLERANCE)
