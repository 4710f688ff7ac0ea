"""The HTML report: one file, no network, everything in it.

    html = zerograph.report.render(document)

data.py        what the script draws, in columns
overview.py    what the page says without a script
colours.py     one colour for each collective and category
recorded.py    what is read of a recorded run
templates/     the page and its style
script/        the parts of the script, in the order of `SCRIPTS`
"""

import json
from functools import cache

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from zerograph.document import Document
from zerograph.report import colours, overview
from zerograph.report.data import payload
from zerograph.report.recorded import Recorded, RecordedSpan, check_recording

__all__ = ["Recorded", "RecordedSpan", "render"]

SCRIPTS = (
    "core",
    "state",
    "diff",
    "renumber",
    "list",
    "passes",
    "zoom",
    "timeline",
    "memory",
    "graph",
    "kernels",
    "search",
    "main",
)


def render(document: Document, recording: Recorded | None = None) -> str:
    """The report of a plan, and of one recorded step of it, as one HTML page.

    The same document gives the same page, byte for byte. Raises PlanError for a recording of another plan.
    """
    if recording is not None:
        check_recording(document, recording)
    environment = _environment()
    return environment.get_template("report.html.j2").render(
        document=document,
        recording=recording,
        overview=overview,
        data=_embedded(payload(document, recording)),
        script=Markup("\n".join(_source(environment, f"{name}.js") for name in SCRIPTS)),
        style=_style(environment, document),
    )


@cache
def _environment() -> Environment:
    folders = [PackageLoader(__name__, name) for name in ("templates", "script")]
    return Environment(
        loader=ChoiceLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _style(environment: Environment, document: Document) -> Markup:
    found = {
        **{f"c-{k}": v for k, v in colours.collective_colours(_kinds(document)).items()},
        **{f"m-{k}": v for k, v in colours.memory_colours(document.memory.categories).items()},
        **{f"s-{k}": v for k, v in colours.STREAMS.items()},
    }
    return Markup(environment.get_template("style.css.j2").render(colours=found))


def _kinds(document: Document) -> list[str]:
    """Kinds of collectives; gather always, as the colour of communication."""
    return ["gather", *document.traffic]


def _embedded(data: object) -> Markup:
    """JSON that no parser of HTML takes for markup."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))
