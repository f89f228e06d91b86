"""The commands that run whole experiments: demo, compare."""

from pathlib import Path

from expunge.cli import printing


def demo(*, out: Path = Path("runs/demo"), seeds: int = 6) -> None:
    """The main job on handwritten digits: train, cache, delete, unlearn, retrain, compare.

    Args:
        out: Folder of the run; a finished seed in it is not computed again.
        seeds: How many times everything is repeated with another seed, at least 3.
    """
    from expunge.bench import demo as digits_demo  # its libraries are extras, and slow to import

    page = digits_demo.run(out, seeds)
    printing.show(*digits_demo.tables(out))
    print(f"\nThe page with pictures: {page.resolve()}")


def compare(*, out: Path = Path("runs/compare"), seeds: int = 3, methods: tuple[str, ...] = ()) -> None:
    """Every method on handwritten digits with the same budget, beside two retrained models and five controls.

    Args:
        out: Folder of the run; a finished seed in it is not computed again.
        seeds: How many times everything is repeated with another seed, at least 3.
        methods: Names of those who take part, by default all.
    """
    from expunge.bench import compare as comparison  # its libraries are extras, and slow to import

    page = comparison.run(out, seeds, methods)
    printing.show(*comparison.tables(comparison.rows(out, methods)))
    print(f"\nThe page with pictures: {page.resolve()}")
