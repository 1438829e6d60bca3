"""Run the pipeline in a copy of this checkout: `python -m pipeline.scratch [FOLDER]`, by default build/scratch.

`dvc repro` in the checkout writes tracked files: dvc.lock, metrics, plots, docs/models. In a copy it leaves `git status` clean. The
trained files (model.onnx, model.pt, card.json) are brought back into models/. The copy shares the checkout's DVC cache, so a later
`dvc repro` in the checkout restores what the copy has trained.
"""

import shutil
import subprocess
import sys
from pathlib import Path

# What the stages read, as git pathspecs; what they write stays out, so that DVC finds it as it left it.
SOURCES = (
    ".dvc/config",
    ".dvcignore",
    "data/sample",
    "dvc.yaml",
    "models/*.py",
    "params.yaml",
    "pipeline",
    "service/tercet/card.py",
)


def train(target: Path) -> None:
    """Copy the sources as they are in the working tree, run `dvc repro` in the copy, and bring the trained files back."""
    listed = subprocess.run(["git", "ls-files", "-z", *SOURCES], check=True, capture_output=True, text=True).stdout  # noqa: S603, S607
    for name in filter(None, listed.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, target / name)
    # Without SCM, DVC neither minds that the copy is ignored by git nor writes .gitignore files.
    cache = Path(".dvc", "cache").absolute()
    (target / ".dvc" / "config.local").write_text(f"[core]\n    no_scm = true\n[cache]\n    dir = {cache}\n")
    subprocess.run(["dvc", "repro"], check=True, cwd=target)  # noqa: S607
    for card in target.glob("models/*/card.json"):
        for name in ("model.onnx", "model.pt", "card.json"):
            shutil.copyfile(card.with_name(name), Path("models", card.parent.name, name))


if __name__ == "__main__":
    try:
        train(Path(sys.argv[1] if len(sys.argv) > 1 else "build/scratch"))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
