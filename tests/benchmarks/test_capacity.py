"""benchmarks/capacity.py: the simulation says what is known in closed form."""

import importlib.util
import sys

import pytest

from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location("capacity", REPOSITORY / "benchmarks/capacity.py")
assert SPEC
assert SPEC.loader
capacity = importlib.util.module_from_spec(SPEC)
sys.modules["capacity"] = capacity  # dataclasses look for their module
SPEC.loader.exec_module(capacity)
Costs, Simulation = capacity.Costs, capacity.Simulation


@pytest.mark.parametrize("in_flight", [1, 2, 32])
def test_one_loop(in_flight: int) -> None:
    """A loop that takes 1 ms a request answers 1,000 a second, each after as many ms as requests are in flight."""
    found = Simulation(Costs(loop=1e-3)).closed(2000, in_flight)
    assert found.requests_per_second == pytest.approx(1000, rel=0.02)  # a batch leaves at once
    assert found.p50 == pytest.approx(in_flight * 1e-3)


@pytest.mark.parametrize("rows", [1, 64])
def test_one_engine(rows: int) -> None:
    """One caller waits for the start of a batch and for its rows, and nothing else."""
    found = Simulation(Costs(loop=1e-3, start=2e-3, row=1e-4), rows=rows).closed(500, 1)
    assert found.mean == pytest.approx(3e-3 + rows * 1e-4)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_random_arrivals(load: float) -> None:
    """Poisson arrivals at one deterministic server wait load / (2 (1 - load)) of its time: M/D/1, Pollaczek and Khinchine."""
    found = Simulation(Costs(loop=0, start=1e-3), inline_rows=0, batch_rows=1).open(30_000, load * 1e3)
    assert found.mean - 1e-3 == pytest.approx(load / (2 * (1 - load)) * 1e-3, rel=0.08)


def test_batches_share_a_start() -> None:
    """32 callers whose batches cost only their start are answered more than 10 times as fast as with batches of one row."""
    costs = Costs(loop=1e-6, start=1e-3)
    together, alone = (Simulation(costs, inline_rows=0, batch_rows=rows).closed(3000, 32) for rows in (1024, 1))
    assert alone.requests_per_second == pytest.approx(1000, rel=0.01)
    assert together.requests_per_second > 10 * alone.requests_per_second


@pytest.mark.parametrize("balance", ["round robin", "least"])
def test_two_workers(balance: str) -> None:
    """Two workers answer twice as many, unless there is one core for both, or one connection that stays with one of them."""
    costs, settings = Costs(loop=1e-3), {"workers": 2, "balance": balance}
    assert Simulation(costs, **settings).closed(4000, 32).requests_per_second == pytest.approx(2000, rel=0.01)
    assert Simulation(costs, **settings, cores=1).closed(4000, 32).requests_per_second == pytest.approx(1000, rel=0.01)
    stuck = Simulation(costs, workers=2, connections=1).closed(4000, 32)
    assert stuck.requests_per_second == pytest.approx(1000, rel=0.01)


def test_the_load_generator_takes_part() -> None:
    """A load generator that needs a millisecond a request caps what any number of workers can show."""
    found = Simulation(Costs(loop=1e-3, client=1e-3), workers=4, balance="least").closed(4000, 32)
    assert found.requests_per_second == pytest.approx(1000, rel=0.01)


def test_needs() -> None:
    """10,000 requests/s of 150 us, at 60 % of a core, are 2.5 cores; 1,000 bytes each are 0.08 Gbit/s."""
    told = capacity.needs(10_000, 150e-6, 1000, host_cores=16, utilisation=0.6, price=0.04).split()
    assert told == ["3", "1", "0.08", "73"]
