"""Compare four optimisers on one model, as DVC experiments: `python -m benchmarks.optimizers fizzbuzz`.

All start from the same weights and see the same batches. The workspace does not change; the experiments are called fizzbuzz-sgd,
fizzbuzz-momentum and so on. `dvc exp show` lists their metrics, and the command that is printed at the end draws their learning
curves in one plot.
"""

import subprocess

import click

OPTIMIZERS = {
    "sgd": "name: SGD",
    "momentum": "name: SGD, momentum: 0.9",
    "rmsprop": "name: RMSprop",
    "adam": "name: Adam",
}


@click.command()
@click.argument("model")
@click.option("--lr", default=0.01, show_default=True, help="Learning rate of all four.")
def main(model: str, lr: float) -> None:
    """Train MODEL once with each optimiser."""
    section, experiments = f"models.{model}.train.optimizer", []
    for name, settings in OPTIMIZERS.items():
        change = ["-S", f"~{section}", "-S", f"+{section}={{{settings}, lr: {lr}}}"]
        experiments.append(f"{model}-{name}")
        experiment = ["dvc", "exp", "run", "--temp", "--force", "--name", experiments[-1], *change, f"train@{model}"]
        subprocess.run(experiment, check=True)  # noqa: S603
    print(f"dvc plots diff {' '.join(experiments)} --targets models/{model}/report/training/plots/metrics --open")


if __name__ == "__main__":
    main()
