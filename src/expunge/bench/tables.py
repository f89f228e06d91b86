"""What tables of experiments share."""

from expunge.bench.experiments import Experiment, everyone
from expunge.bench.printed import printed
from expunge.bench.profiles import effort, task
from expunge.bench.tasks import Scenario

REMOVAL = ("NA", "FA", "FE", "FMIA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "NSKL", "FSKL", "Cost", "Work")


def in_class(name: str, profile: str, dataset: str) -> Experiment:
    """Everyone on the removal of 100 images of a class, with the figures of the paper's Table 2."""
    scenario = Scenario(kind="in-class", amount=100)
    situation = task(profile, dataset, scenario)
    return Experiment(
        name=name,
        profile=profile,
        tasks=(situation,),
        contenders=everyone("removal"),
        effort=effort(situation, profile),
        shown=REMOVAL,
        printed=printed("table2", scenario.name),
    )
