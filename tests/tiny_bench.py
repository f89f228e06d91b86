"""A small experiment on the digits that the tests of the bench share."""

from dataclasses import replace

from expunge.bench import experiments
from expunge.bench.experiments import Experiment
from expunge.bench.runner import Serial, carry_out
from expunge.bench.stages import Contender, Effort
from expunge.bench.store import Store
from expunge.bench.tasks import Scenario, Task
from expunge.rows import read_rows
from expunge.training import Recipe

RECIPE = Recipe(epochs=4, lr=0.3, batch_size=16)


RANDOM = Scenario(kind="random", amount=0.1)


CROSS = Scenario(kind="cross-backdoor", classes=(0, 1))


DIGITS = Task(
    dataset="digits", model="convnet", settings=(("widths", (4, 8)),), recipe=RECIPE, scenario=RANDOM, train=40
)


TWO = (Contender(name="reload", entry="reload"), Contender(name="ssd", entry="ssd"))


BRIEF = Effort(budget=Recipe(epochs=2, lr=0.1, batch_size=16), trials=2)


FILE = '''"""Two methods on the digits."""
from tests.tiny_bench import TINY


def experiment(profile):
    return TINY
'''


def tiny(*tasks, contenders=TWO, effort=BRIEF):
    return Experiment(
        name="tiny",
        profile="cpu",
        tasks=tasks or (DIGITS,),
        contenders=contenders,
        effort=effort,
        shown=("ΔFE", "NSKL"),
    )


TINY = tiny()


def values(folder):
    """All but times, of seed 0."""
    rows = read_rows(folder / "rows.csv")
    return [replace(row, seconds=0.0) for row in rows if row.metric != "Cost" and row.seed == 0]


def run(experiment, root, seeds=(0,)):
    store = Store(root)
    carry_out(experiment.evaluations(seeds), store, Serial(store))
    return experiments.gather(experiment, seeds, store)
