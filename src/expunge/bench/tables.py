"""What tables of experiments share."""

from expunge.bench.experiments import Experiment, everyone
from expunge.bench.printed import printed
from expunge.bench.profiles import effort, task
from expunge.bench.tasks import Scenario

REMOVAL = ("NA", "FA", "FE", "FMIA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "NSKL", "FSKL", "Cost", "Work")


def everyone_on(
    scenario: Scenario, dataset: str, *, name: str, profile: str, shown: tuple[str, ...] = REMOVAL, paper: str = ""
) -> Experiment:
    """All methods and controls in one situation, beside the figures that the paper prints for it.

    Args:
        scenario: What is removed or corrected.
        dataset: Of which data.
        name: Of the experiment.
        profile: How large it is.
        shown: Metrics of its table.
        paper: The table of the paper whose figures these are; by default the one of this name.
    """
    situation = task(profile, dataset, scenario)
    return Experiment(
        name=name,
        profile=profile,
        tasks=(situation,),
        contenders=everyone(scenario.family),
        effort=effort(situation, profile),
        shown=shown,
        printed=printed(paper or name, scenario.name),
    )


def in_class(name: str, profile: str, dataset: str) -> Experiment:
    """Everyone on the removal of 100 images of a class, with the figures of the paper's Table 2."""
    return everyone_on(Scenario(kind="in-class", amount=100), dataset, name=name, profile=profile, paper="table2")
