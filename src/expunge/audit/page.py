"""An audit as files: JSON for programs, one self-contained HTML page and pictures for people."""

import base64
import json
from importlib.resources import files
from pathlib import Path

from expunge.audit.finding import VERDICTS, worst
from expunge.audit.leakage import CacheAudit
from expunge.audit.pictures import is_picture, picture
from expunge.definitions import slug
from expunge.errors import MissingExtra
from expunge.files import replacing, write_text

NOTE = (
    "An attack that found nothing proves nothing: others may find something. Verdicts: recoverable, a record comes "
    "back within a tenth of how much records differ (about 30 dB); partly, a part of it or its membership does; not "
    "shown."
)


def write_audit(folder: Path | str, audit: CacheAudit) -> Path:
    """Write ``audit.json``, ``audit.html`` and a picture for each reconstruction into a folder.

    Returns:
        The path of the page.

    Raises:
        MissingExtra: Jinja2 or Matplotlib is not installed.
        OSError: The disk is full, or the folder cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise MissingExtra("the page of an audit needs Jinja2: pip install 'expunge[report]'.") from error
    folder = Path(folder)
    images = {number: picture(finding) for number, finding in enumerate(audit.findings) if is_picture(finding)}
    for number, image in images.items():
        finding = audit.findings[number]
        with replacing(folder / f"{slug(f'{finding.attack} {finding.place}')}.png") as temporary:
            temporary.write_bytes(image)
    order = sorted(range(len(audit.findings)), key=lambda number: VERDICTS.index(audit.findings[number].verdict))
    parts = [
        {
            "heading": f"{audit.findings[number].attack.capitalize()}, {audit.findings[number].place}",
            "verdict": audit.findings[number].verdict,
            "words": audit.findings[number].words,
            "numbers": {name: _shown(value) for name, value in audit.findings[number].numbers.items()},
            "image": base64.b64encode(images[number]).decode() if number in images else "",
            "shown": "What was recovered."
            if audit.findings[number].truth is None
            else "Above the removed records, below what was recovered of them.",
        }
        for number in order
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("expunge.audit") / "page.html.j2").read_text(encoding="utf-8"))
    styles = dict(zip(VERDICTS, ("worst", "middle", "best"), strict=True))
    text = template.render(
        title="What the cache gives away",
        verdict=worst(audit.findings),
        summary=audit.summary,
        note=f"{audit.removed} removed loss terms; predicted relative error of the difference "
        f"{audit.relative_noise:.1g}. {NOTE}",
        parts=parts,
        style=styles.__getitem__,
    )
    write_text(folder / "audit.json", json.dumps(audit.as_dict(), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "audit.html", text + "\n")
    return folder / "audit.html"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
