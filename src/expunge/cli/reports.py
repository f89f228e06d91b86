"""The commands that work on run folders: report, evidence."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from expunge.cli.arguments import Flag
from expunge.provenance import file_hash

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
UNLIKE = 3  # exit code of a verification that found a difference


def report(run: RunFolder, *, format: Literal["html", "markdown", "latex", "csv"] = "html") -> None:
    """Write a report into a run folder: a page with tables and figures, or the tables alone.

    Args:
        run: Folder of a run, as `expunge demo` and `expunge evaluate --out` write them.
        format: html (report.html), markdown (report.md), latex (report.tex) or csv (report.csv, with all digits).
    """
    from expunge.report import written

    print(written.write(run, format))


def evidence(run: RunFolder, *, verify: Flag = False, replace: Flag = False) -> None:
    """Write evidence.json and evidence.html for an auditor into a run folder, or verify them.

    Args:
        run: Folder of a run.
        verify: Compare the files with their hashes in evidence.json; exit code 3 if any differs.
        replace: Write over evidence that exists.
    """
    from expunge.report import evidence as proof

    path = run / proof.NAME
    if not verify:
        proof.write_evidence(run, replace=replace)
    elif wrong := proof.verify(run):
        print(
            f"expunge: {run} is not as it was when its evidence was written:\n  "
            + "\n  ".join(wrong)
            + "\nRestore what differs from the copy that was lodged. If a change is meant, write new evidence with "
            "--replace and say why.",
            file=sys.stderr,
        )
        raise SystemExit(UNLIKE)
    print(f"{'verified' if verify else 'evidence'}: {path} and {proof.PAGE}")
    print(f"SHA-256 of {proof.NAME}: {file_hash(path)}")
    if verify:
        for line in proof.unchecked(run):
            print(f"not checked: {line}")
    else:
        print(
            "Sign evidence.json, or lodge this SHA-256 where it cannot be changed: the hashes inside show no more than"
        )
        print("that files fit each other.")
