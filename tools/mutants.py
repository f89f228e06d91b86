"""Does the test suite see mistakes? Plant one bug at a time in a copy of the source; the named tests must fail.

Run ``python tools/mutants.py`` for all of them, or name some. A bug that no test sees is printed as SURVIVED, and
the exit status is 1. The checkout itself is never changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2
LIMIT = 180  # seconds; a mutant that hangs is caught, too
PASSED, FAILED, WRONG_COPY = 0, 1, 99  # pytest's exit statuses, and that of the guard

# pytest loads this first: the tests must import the copy, not the installed package.
GUARD = f"""
import importlib.util, os, pathlib
spec = importlib.util.find_spec("expunge")
if not pathlib.Path(spec.origin).is_relative_to(pathlib.Path(__file__).parent):
    print("the tests would import", spec.origin, flush=True)
    os._exit({WRONG_COPY})
"""


CONTRACT = "contract/test_methods.py::test_"
COSTS = "contract/test_costs.py::test_"


@dataclass(frozen=True)
class Mutant:
    """A bug to plant."""

    name: str
    file: str  # under src/expunge
    old: str  # must occur exactly once
    new: str
    tests: str  # what of tests/ must see it


MUTANTS = (
    Mutant(
        "the subtraction is reversed",
        "gradient.py",
        "params.subtract(self.total, part.total)",
        "params.subtract(part.total, self.total)",
        "test_reload.py",
    ),
    Mutant(
        "means instead of sums are accumulated",
        "gradient.py",
        "terms.backward(torch.ones_like(terms))",
        "terms.backward(torch.ones_like(terms) / len(terms))",
        "test_reload_oracle.py",
    ),
    Mutant(
        "gradients are accumulated in float32",
        "accumulator.py",
        "torch.zeros(size, dtype=torch.float64, device=home or device)",
        "torch.zeros(size, dtype=torch.float32, device=home or device)",
        "test_reload_oracle.py",
    ),
    Mutant(
        "the model stays in train mode for the gradient pass",
        "gradient.py",
        "            model.eval()\n            yield",
        "            yield",
        "test_reload_oracle.py",
    ),
    Mutant(
        "touched micro-batches count half in the rounding floor",
        "gradient.py",
        "_, touched = mine.touched_by(theirs)",
        "touched = 0.5 * mine.touched_by(theirs)[1]",
        "test_reload.py",
    ),
    Mutant(
        "batch-norm statistics are not part of the fingerprint",
        "params.py",
        "kept = set(model.state_dict())",
        "kept = set[str]()",
        "test_unlearn.py",
    ),
    Mutant(
        "ties are taken from the end",
        "params.py",
        ".squeeze(1)[-surplus:]",
        ".squeeze(1)[:surplus]",
        "test_reload.py",
    ),
    Mutant(
        "the checksum of a cache is not compared",
        "cache.py",
        "if checksum != _checksum(fields, tensors):",
        "if False:",
        "test_cache.py",
    ),
    Mutant(
        "a file is written in place",
        "files.py",
        'temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "temporary = path",
        "test_files.py",
    ),
    Mutant(
        "a failed write leaves its temporary file behind",
        "files.py",
        "temporary.unlink(missing_ok=True)",
        "pass",
        "test_files.py",
    ),
    Mutant(
        "the last batch of one example is left alone",
        "batches.py",
        "if len(rows) > 1 and len(rows[-1]) == 1:",
        "if len(rows) > 1 and len(rows[-1]) == 0:",
        "test_training.py",
    ),
    Mutant(
        "the global generators are seeded for good",
        "seeds.py",
        "with torch.random.fork_rng(devices=devices):",
        "for _ in [devices]:",
        CONTRACT + "leaves_global_randomness_untouched",
    ),
    Mutant(
        "knowledge values are inverted",
        "selectors.py",
        "(removed[name].abs() + eps) / (full[name].abs() + eps) for",
        "(full[name].abs() + eps) / (removed[name].abs() + eps) for",
        "test_selectors.py",
    ),
    Mutant(
        "the random selector ignores its seed",
        "selectors.py",
        'stream(evidence.seed, "selector", name)',
        'stream(0, "selector", name)',
        "test_selectors.py",
    ),
    Mutant(
        "the seed of untrained models is ignored",
        "access.py",
        'with seeded(seed, "fresh"):',
        'with seeded(0, "fresh"):',
        "test_unlearn.py",
    ),
    Mutant(
        "the shuffle is the same for every seed",
        "training.py",
        'stream(seed, "shuffle", epoch)',
        'stream(0, "shuffle", epoch)',
        "test_training.py",
    ),
    Mutant(
        "freeze_statistics is ignored",
        "training.py",
        "    if freeze_statistics:",
        "    if False:",
        CONTRACT + "batch_norm_statistics_never_see_the_removed_records",
    ),
    Mutant(
        "the stop rule forgets its tolerance",
        "training.py",
        "enough = target * (1 + tolerance)",
        "enough = target",
        "test_training.py",
    ),
    Mutant(
        "the ascent descends",
        "methods/reload.py",
        "p.add_((step * direction).to(p))",
        "p.sub_((step * direction).to(p))",
        "test_reload.py",
    ),
    Mutant(
        "the ascent is not divided by the number of terms",
        "methods/reload.py",
        "in config.published_code else terms)",
        "in config.published_code else 1)",
        "test_reload_oracle.py",
    ),
    Mutant(
        "everything but the chosen entries is re-initialised",
        "methods/reinitialise.py",
        "torch.where(chosen[name].to(p.device), values[name], p)",
        "torch.where(chosen[name].to(p.device), p, values[name])",
        "test_reload.py",
    ),
    Mutant(
        "untouched entries are re-initialised after all",
        "methods/choice.py",
        "if not reset_untouched:",
        "if False:",
        "test_reload.py",
    ),
    Mutant(
        "one entry too many is re-initialised",
        "methods/choice.py",
        "count = math.floor(",
        "count = math.ceil(",
        "test_reload.py",
    ),
    Mutant(
        "the fraction to re-initialise is a float product",
        "methods/choice.py",
        "Fraction(repr(float(fraction)))",
        "Fraction(float(fraction))",
        "test_reload.py",
    ),
    Mutant(
        "a share of each layer is one of all entries",
        "methods/choice.py",
        'if scope == "layer" else',
        "if False else",
        "test_reload_options.py",
    ),
    Mutant(
        "a threshold leaves out what equals it",
        "methods/choice.py",
        "score <= threshold",
        "score < threshold",
        "test_reload_options.py",
    ),
    Mutant(
        "vectors are re-initialised after all",
        "methods/choice.py",
        "if reset_1d or score.ndim > 1",
        "if reset_1d or score.ndim > 0",
        "test_reload_options.py",
    ),
    Mutant(
        "statistics are a moving average of what is left",
        "methods/reinitialise.py",
        "layer.momentum = None",
        "layer.momentum = 0.1",
        "test_reload_options.py",
    ),
    Mutant(
        "dropout is active when statistics are estimated",
        "methods/reinitialise.py",
        "        model.eval()\n        for layer",
        "        model.train()\n        for layer",
        "test_reload_options.py",
    ),
    Mutant(
        "obs adds the gained loss instead of subtracting it",
        "selectors.py",
        ".square() / 2 - g *",
        ".square() / 2 + g *",
        "test_selectors.py",
    ),
    Mutant(
        "ekfac takes the smallest steps first",
        "selectors.py",
        "step.abs_().neg_()",
        "step.abs_()",
        "test_selectors.py",
    ),
    Mutant(
        "the eigenvalues of ekfac are not damped",
        "curvature.py",
        "(rotated / (block.moments + floor))",
        "(rotated / block.moments)",
        "test_selectors.py",
    ),
    Mutant(
        "the bias is no input of a Kronecker factor",
        "methods/kronecker.py",
        "torch.ones_like(a[..., :1])",
        "torch.zeros_like(a[..., :1])",
        "test_reload_curvature.py",
    ),
    Mutant(
        "places of an example are squared one by one",
        "methods/kronecker.py",
        "square = (rotated_g.mT @ rotated_a).square().sum(0)",
        "square = (rotated_g.square().mT @ rotated_a.square()).sum(0)",
        "test_reload_curvature.py",
    ),
    Mutant(
        "a weight that is read outside its layer has a Kronecker block",
        "methods/kronecker.py",
        "<= tolerance * truth.norm()",
        "<= 1e9 * truth.norm()",
        "test_reload_curvature.py",
    ),
    Mutant(
        "retraining starts from the trained weights",
        "methods/retrain.py",
        "model = given.fresh_model(seed, model).to(device).train(model.training)",
        "model = model.to(device)",
        "test_unlearn.py",
    ),
    Mutant(
        "gradient ascent descends",
        "methods/gradient_ascent.py",
        "return -terms(model, batch)",
        "return terms(model, batch)",
        "test_unlearn.py",
    ),
    Mutant(
        "a blind method is handed the removed records",
        "unlearn.py",
        "if method.blind and type(given) is not Blind:",
        "if False:",
        CONTRACT + "blind_methods_are_handed_nothing_that_has_a_forget_set",
    ),
    Mutant(
        "the model that was given is changed",
        "unlearn.py",
        "method.run(copy.deepcopy(inner), given,",
        "method.run(inner, given,",
        CONTRACT + "leaves_the_model_it_is_given_untouched",
    ),
    Mutant(
        "NaN in the result is returned",
        "unlearn.py",
        'params.require_finite(_tensors(unlearned, infinite), f"the result of {method.name}")',
        "pass",
        CONTRACT + "nan_in_what_comes_out_is_reported_with_the_name_of_the_method",
    ),
    Mutant(
        "the symmetric KL divergence is halved",
        "metrics/classification.py",
        "* (log_p - log_q)).sum(axis=1).mean())",
        "* (log_p - log_q)).sum(axis=1).mean() / 2)",
        "test_metrics.py",
    ),
    Mutant(
        "the membership attack is judged on what it was fitted on",
        "metrics/membership.py",
        "LogisticRegression().fit(losses[fit], truth[fit])",
        "LogisticRegression().fit(losses[judge], truth[judge])",
        "test_metrics.py",
    ),
    Mutant(
        "a method does nothing (fine-tuning)",
        "methods/fine_tune.py",
        "train(model, given.retain, given.loss_terms, config.recipe, seed=seed, trace=trace, stop=stop)",
        'trace.stopped = "nothing"',
        CONTRACT + "moves_the_weights_and_the_forget_loss",
    ),
    Mutant(
        "fine-tuning has no guard",
        "methods/fine_tune.py",
        ", trace=trace, stop=stop)",
        ", trace=trace)",
        "test_unlearn.py",
    ),
    Mutant(
        "the guard restores nothing",
        "methods/guard.py",
        "tensor.copy_(last[name])",
        "last[name].copy_(tensor)",
        "test_unlearn.py",
    ),
    Mutant(
        "the guard says nothing",
        "methods/guard.py",
        'trace.warn(f"{trace.method}: {reason}. {cure}")',
        "pass",
        COSTS + "settings_far_too_large_end_in_a_note_and_a_model_that_works_or_in_an_error",
    ),
    Mutant(
        "EU-k keeps the running statistics",
        "methods/eu_k.py",
        "*module.named_buffers(recurse=False)]",
        "]",
        "test_cf_eu.py",
    ),
    Mutant(
        "EU-k re-initialises nothing",
        "methods/eu_k.py",
        "tensor.copy_(untrained[full])",
        "pass",
        "test_cf_eu.py",
    ),
    Mutant(
        "CF-k counts only top-level modules",
        "methods/leaf_layers.py",
        "everything = dict(model.named_modules())",
        "everything = dict(model.named_children())",
        "test_cf_eu.py",
    ),
    Mutant(
        "frozen normalisations follow the data",
        "methods/leaf_layers.py",
        "            module.eval()\n        return loss_terms",
        "            pass\n        return loss_terms",
        "test_cf_eu.py",
    ),
    Mutant(
        "removed records pass in train mode",
        "methods/together.py",
        "            with frozen_statistics(model):\n                parts.append(on_forget(model, forget))",
        "            parts.append(on_forget(model, forget))",
        CONTRACT + "batch_norm_statistics_never_see_the_removed_records",
    ),
    Mutant(
        "the L1 penalty rewards",
        "methods/l1_sparse.py",
        "terms + strength * l1_norm(theta)",
        "terms - strength * l1_norm(theta)",
        "test_l1_sparse.py",
    ),
    Mutant(
        "Fisher noise is not scaled in the last layer",
        "methods/fisher.py",
        "v *= 10",
        "v *= 1",
        "test_fisher.py",
    ),
    Mutant(
        "classes are not weighed by their probability",
        "methods/fisher.py",
        "(-(log_p.detach() / 2).exp() * log_p)",
        "(-log_p)",
        "test_fisher.py",
    ),
    Mutant(
        "per-example squares are squares of a sum",
        "methods/layer_squares.py",
        "products.square_().sum(0)",
        "products.sum(0).square_()",
        "test_fisher.py",
    ),
    Mutant(
        "SSD dampens what matters to the rest",
        "methods/ssd.py",
        "removed[name] > selection * full[name]",
        "full[name] > selection * removed[name]",
        "test_ssd.py",
    ),
    Mutant(
        "the SCRUB teacher is its student",
        "methods/bad_teacher.py",
        "copy.deepcopy(model).eval().requires_grad_(False)",
        "model",
        "test_scrub.py",
    ),
    Mutant(
        "SCRUB obeys on the removed records",
        "methods/scrub.py",
        "        return -terms\n",
        "        return terms\n",
        "test_scrub.py",
    ),
    Mutant(
        "SCRUB rewinds to the error on all validation records",
        "methods/scrub.py",
        ', classes=classes_in(given.forget, "scrub"))',
        ")",
        "test_scrub.py",
    ),
    Mutant(
        "the bad teacher is the good one",
        "methods/bad_teacher.py",
        "bad = teacher(given.fresh_model(seed, model).to(next(model.parameters())))",
        "bad = teacher(model)",
        "test_bad_teacher.py",
    ),
    Mutant(
        "a wrong label may be the true one",
        "methods/amnesiac.py",
        "torch.randint(1, classes,",
        "torch.randint(0, classes,",
        "test_amnesiac.py",
    ),
    Mutant(
        "momentum of masked weights is kept",
        "methods/salun.py",
        "remembered.masked_fill_(fixed[name], 0)",
        "pass",
        "test_salun.py",
    ),
    Mutant(
        "SalUn moves the least salient weights",
        "methods/salun.py",
        "total.abs().neg_()",
        "total.abs()",
        "test_salun.py",
    ),
    Mutant(
        "the log restores nothing",
        "methods/update_log.py",
        "change += update.change[name]",
        "pass",
        "test_amnesiac.py",
    ),
    Mutant(
        "GAR descends first",
        "methods/gar.py",
        "return -given.loss_terms(model, batch)",
        "return given.loss_terms(model, batch)",
        "test_gar_grda.py",
    ),
    Mutant(
        "the difference of GRDA is reversed",
        "methods/grda.py",
        "theta[name].add_(",
        "theta[name].sub_(",
        "test_gar_grda.py",
    ),
    Mutant(
        "DUCK moves to the nearest class, the own one too",
        "methods/duck.py",
        "similarity.masked_fill(own, -math.inf).argmax(1)",
        "similarity.argmax(1)",
        "test_duck.py",
    ),
    Mutant(
        "the new label may be the own class",
        "methods/boundary_shrink.py",
        "scores.scatter(1, labels[:, None], -math.inf).argmax(1)",
        "scores.argmax(1)",
        "test_boundary.py",
    ),
    Mutant(
        "the shadow class is never pruned",
        "methods/boundary_expand.py",
        "return model  # pruned",
        "return expanded  # pruned",
        "test_boundary.py",
    ),
    Mutant(
        "UNSIR learns easy noise",
        "methods/unsir.py",
        ".mean() - loss\n",
        ".mean() + loss\n",
        "test_unsir.py",
    ),
    Mutant(
        "teachers do not count",
        "methods/bad_teacher.py",
        "trace.forwarded += len(inputs)",
        "pass",
        COSTS + "the_trace_counts_every_example_that_passed",
    ),
    Mutant(
        "the high-water mark is never reset",
        "trace.py",
        'Path("/proc/self/clear_refs").write_text("5", encoding="ascii")',
        "pass",
        COSTS + "peak_memory_is_by_how_much_the_memory_grew",
    ),
    Mutant(
        "SISA goes back one slice too few",
        "exact/sisa.py",
        "self._checkpoints.state(shard, start - 1)",
        "self._checkpoints.state(shard, start)",
        "test_sisa.py",
    ),
    Mutant(
        "a spent budget is no reason to stop",
        "exact/head.py",
        "if float(spent.norm()) <= config.budget:",
        "if True:",
        "test_certified.py",
    ),
    Mutant(
        "the certificate forgets what was spent",
        "exact/head.py",
        "data = worst = before = self.spent",
        "data = worst = before = torch.zeros_like(self.spent)",
        "test_certified.py",
    ),
    Mutant(
        "propagation is not recomputed after a removal",
        "exact/graph.py",
        "propagated = propagate(left, self.how)",
        "propagated = self.propagated",
        "test_graph.py",
    ),
    Mutant(
        "every trial draws from the same stream",
        "bench/tuning.py",
        'derive(seed, "trial", len(done))',
        'derive(seed, "trial", 0)',
        "test_tuning.py",
    ),
    Mutant(
        "a trial that failed is the best",
        "bench/tuning.py",
        "score, failure = math.inf, str(error)",
        "score, failure = -math.inf, str(error)",
        "test_tuning.py",
    ),
    Mutant(
        "a journal of another search is taken",
        "bench/tuning.py",
        "    if first != header:",
        "    if first is None:",
        "test_tuning.py",
    ),
    Mutant(
        "learning rates are searched on a linear scale",
        "bench/tuning.py",
        "FloatDistribution(values.low, values.high, log=values.log)",
        "FloatDistribution(values.low, values.high)",
        "test_tuning.py",
    ),
    Mutant(
        "a pseudo-forget set stays in what is left",
        "bench/rehearsal.py",
        "    kept[rows] = False",
        "    kept[rows] = True",
        "test_rehearse.py",
    ),
    Mutant(
        "pseudo-forget sets overlap",
        "bench/rehearsal.py",
        "order[: count * sets].split(count)]",
        "[order[n : n + count] for n in range(sets)]]",
        "test_rehearse.py",
    ),
    Mutant(
        "a pseudo-forget set that is easy by chance does not balance a hard one",
        "bench/closeness.py",
        "abs(float(apart.mean()))",
        "float(np.abs(apart).mean())",
        "test_rehearse.py",
    ),
    Mutant(
        "settings are confirmed on a set that they were tuned on",
        "cli/rehearse.py",
        "prepared[sets:]",
        "prepared[:1]",
        "test_rehearse.py",
    ),
    Mutant(
        "a subset loses the positions of its data",
        "batches.py",
        "known.only(known.positions[rows])",
        "known.only(rows)",
        "test_rehearse.py",
    ),
    Mutant(
        "the introspection figure shows the first three of many convolutions",
        "bench/introspection.py",
        "found[:5:2]",
        "found[:3]",
        "test_introspection.py",
    ),
)


def snapshot(folder: Path) -> None:
    """Copy the source and its tests, so that they stay as they are while someone edits the checkout."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src" / "mutant_guard.py").write_text(GUARD)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests in a copy: pytest's exit status, and what it printed."""
    paths = [f"tests/{each}" for each in tests]
    command = [sys.executable, "-m", "pytest", *paths, "-p", "mutant_guard", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, "-x", "--no-header", "-q"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED, "FAILED (timed out)"
    return done.returncode, done.stdout + done.stderr


def require_clean(clean: Path, mutants: Sequence[Mutant]) -> None:
    """Stop unless every bug can be planted, and every test passes without one."""
    for mutant in mutants:
        found = (clean / "src" / "expunge" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if found != 1:
            sys.exit(f"{mutant.name!r}: {mutant.file} has {mutant.old!r} {found} times, not once. Adapt the mutant.")
    status, output = run_tests(clean, sorted({mutant.tests for mutant in mutants}))
    if status != PASSED:
        sys.exit(f"{output}\nThe tests must pass without a mutant first (pytest's exit status was {status}).")


def verdict(clean: Path, mutant: Mutant) -> tuple[str, float, str]:
    """Whether the tests see a bug, in how many seconds, and which test did."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(clean, folder)
        path = folder / "src" / "expunge" / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        status, output = run_tests(folder, [mutant.tests])
    spent = time.perf_counter() - start
    saw = next((line.split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")), "")
    if status == PASSED:
        return "SURVIVED", spent, ""
    if status == FAILED and saw:
        return "caught", spent, saw.removeprefix("FAILED ").removeprefix("tests/")
    sys.exit(f"{output}\n{mutant.name!r}: pytest ended with status {status}, so the tests said nothing.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="words of the names of some mutants; all by default")
    words = parser.parse_args().names
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        parser.error(f"no mutant has {' or '.join(words)} in its name")
    start, survivors = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as clean, ThreadPoolExecutor(AT_ONCE) as pool:
        snapshot(Path(clean))
        require_clean(Path(clean), chosen)
        print(f"{'verdict':<9} {'s':>4}  {'planted bug':<58} {'file':<26} seen first by")
        found = pool.map(partial(verdict, Path(clean)), chosen)
        for mutant, (said, spent, saw) in zip(chosen, found, strict=True):
            survivors += said == "SURVIVED"
            print(f"{said:<9} {spent:4.0f}  {mutant.name:<58} {mutant.file:<26} {saw or mutant.tests}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught in {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
