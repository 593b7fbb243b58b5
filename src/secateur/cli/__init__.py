"""The command line: the only code that prints or exits.

Commands are imported when they are called, so ``--help`` and ``list`` start without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from cyclopts import App, CycloptsError

from .. import __version__
from ..errors import SecateurError
from ..methods import Kind, get
from .console import complain
from .listing import details

COMMANDS = {
    "demo": ("secateur.cli.demo:demo", "Watch a backdoored network being made, measured, cut, healed and proved."),
    "info": ("secateur.cli.info:info", "Tell what a checkpoint is and what speaks against it; nothing of it is run."),
    "convert": ("secateur.cli.convert:convert", "Write a checkpoint as a bundle, which needs no pickle."),
    "repair": ("secateur.cli.repair:repair", "Repair a network with a little clean data."),
    "compress": ("secateur.cli.compress:compress", "Compress a network, and say what that does to its robustness."),
    "attack": ("secateur.cli.attack:attack", "Measure robustness to small changes, and what speaks against the figure."),
    "train": ("secateur.cli.train:train", "Train a network, for instance a victim on poisoned images."),
    "poison": ("secateur.cli.poison:poison", "Put a backdoor trigger into a training set."),
    "report": ("secateur.cli.report:report", "Show a result again, as text, HTML, Markdown, JSON or SARIF."),
    "list": ("secateur.cli.listing:list_methods", "List the methods of one kind, or all settings of one method."),
}
BENCH = {
    "run": ("secateur.cli.bench:run", "Run a plan, or what is left of it."),
    "status": ("secateur.cli.bench:status", "Say how far a plan is."),
    "report": ("secateur.cli.bench:report", "Print a plan's table as text, Markdown, CSV, JSON or Parquet."),
    "reindex": ("secateur.cli.bench:reindex", "Write the index of a store anew from its results."),
}
METHODS_OF: Mapping[str, Kind] = {"repair": "repair", "compress": "compressor", "poison": "backdoor", "attack": "evasion"}
EXIT_UNEXPECTED = 2
EXIT_INTERRUPTED = 130


def app(arguments: Sequence[str] = ()) -> App:
    """Build the command-line application; with ``--method NAME`` in the arguments, help tells that method's settings."""
    root = App(
        name="secateur",
        help="Audit, repair by pruning, compress and prove: for networks somebody else trained.",
        version=f"secateur {__version__}",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    for name, (target, text) in COMMANDS.items():
        root.command(target, name=name, help=text, help_format="plaintext", help_epilogue=_settings(name, arguments))
    bench = App(name="bench", help="Run a plan of models x backdoors x repairs x seeds, and print its table.")
    for name, (target, text) in BENCH.items():
        bench.command(target, name=name, help=text, help_format="plaintext")
    root.command(bench)
    return root


def _settings(verb: str, arguments: Sequence[str]) -> str | None:
    """Return the settings of the method that the arguments name, for the end of a verb's help."""
    if (
        verb not in METHODS_OF
        or verb not in arguments
        or not {"--help", "-h"} & set(arguments)
        or "--method" not in arguments[:-1]
    ):
        return None
    name = arguments[arguments.index("--method") + 1]
    return details(get(METHODS_OF[verb], name))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: see ``docs/cli.md`` for the codes."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments)(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except SecateurError as error:
        if debug:
            raise
        complain(str(error))
        return error.exit_code
    except CycloptsError as error:
        if debug:
            raise
        complain(f"{str(error).strip().splitlines()[0]} (see secateur --help)")
        return EXIT_UNEXPECTED
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED
    except MemoryError:
        if debug:
            raise
        complain("there is not enough memory for this; use a smaller file, fewer images or a larger machine")
        return EXIT_UNEXPECTED
    except Exception as error:
        if debug:
            raise
        complain(f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)")
        return EXIT_UNEXPECTED
    return code if isinstance(code, int) else 0
