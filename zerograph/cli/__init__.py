"""The command line: `zerograph plan`, `show`, `diff`, `report`, `export`, `kernels`, `tune` and `doctor`.

    app.py          the application, its errors and exit codes
    options.py      how a model is planned: options that several commands share
    source.py       MODEL: a factory, or a config of transformers
    huggingface.py  a config of transformers as a model with example inputs
    inputs.py       --input name=dtype[shape]
    planning.py     MODEL and options to a plan; PLAN or MODEL to a Document
    tables.py       what people read
    plan.py, show.py, diff.py, report.py, export.py, kernels.py, tune.py, doctor.py   one command each

Exit codes: 0; 1 if `diff` finds a difference; 2 for bad usage or bad input, with one line on stderr.
"""

from zerograph.cli import diff, doctor, export, kernels, plan, report, show, tune
from zerograph.cli.app import app

__all__ = ["app", "diff", "doctor", "export", "kernels", "main", "plan", "report", "show", "tune"]


def main() -> None:
    """The entry point of the `zerograph` script."""
    app(prog_name="zerograph")
