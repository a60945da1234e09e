"""The ``fa-stereo`` command: finds the command named first and hands it the rest."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings

from fa_stereo.errors import InputError

# name -> (module with main(argv) -> exit code, one line for the list)
COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("fa_stereo.cli.predict", "disparity, depth and points of a picture pair, two folders or two globs"),
    "evaluate": (
        "fa_stereo.cli.evaluate",
        "end-point error of weights on a data set, by a named protocol; compare two",
    ),
    "train": ("fa_stereo.cli.train", "train or fine-tune a network (Hydra: experiment=..., key=value)"),
    "summarize": ("fa_stereo.cli.summarize", "training runs of several variants and seeds in one table and plot"),
    "render": ("fa_stereo.cli.render", "write procedural stereo pairs in Scene Flow's layout"),
    "check-data": ("fa_stereo.cli.check_data", "count and verify the files of a data set"),
    "export-weights": ("fa_stereo.cli.export_weights", "make a training checkpoint a small weights file for use"),
    "import-weights": ("fa_stereo.cli.import_weights", "convert an official PSMNet checkpoint"),
    "widen-weights": ("fa_stereo.cli.widen_weights", "the same function at twice the width, to train on from"),
    "export-onnx": ("fa_stereo.cli.export_onnx", "the network of one picture size for other runtimes, checked"),
    "benchmark": ("fa_stereo.cli.benchmark", "time, memory and deviation of the fast path against the plain one"),
    "demo": ("fa_stereo.cli.demo", "predict the bundled pair and compare with OpenCV's SGBM"),
    "show-attention": ("fa_stereo.cli.show_attention", "basis masks of a pair, and what single pixels attend to"),
    "complexity": ("fa_stereo.cli.complexity", "what attention costs: the paper's tables, printed and counted"),
    "compare-attention": (
        "fa_stereo.cli.compare_attention",
        "what attention costs, measured: time, memory and largest input in a budget",
    ),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: fa-stereo COMMAND ...\n\n" + "\n".join(lines) + "\n\n'fa-stereo COMMAND --help' describes one."


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 for success and 2 for unusable input.

    ``FA_STEREO_DEBUG=1`` in the environment shows the traceback of an input error.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from fa_stereo import __version__

        print(f"fa-stereo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"fa-stereo: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = importlib.import_module(COMMANDS[name][0])
    # Of Pillow, about pictures from half the size on that it refuses: whoever names them here knows them.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit .*")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text: as stderr, print them escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return int(command.main(rest))
    except (InputError, OSError) as error:
        if os.environ.get("FA_STEREO_DEBUG"):
            raise
        print(f"fa-stereo {name}: {describe(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        reason = describe_lack(error, name)
        if reason is None or os.environ.get("FA_STEREO_DEBUG"):
            raise
        print(f"fa-stereo {name}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fa-stereo {name}: interrupted", file=sys.stderr)
        return 130


def describe(error: Exception) -> str:
    """Return one sentence for an input error or an error of the operating system."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror[0].lower()}{error.strerror[1:]}"
    return " ".join(str(error).split())


MORE_MEMORY = {
    "train": "lower trainer.micro_batch_size or data.augmentation.crop_height and crop_width, or set "
    "trainer.activation_checkpointing=true",
    "evaluate": "compute bands of rows (tile=64), or take another device",
}
"""What makes do with less memory, by command."""


def describe_lack(error: Exception, command: str) -> str | None:
    """Return one sentence for an error that a lack of memory has led to, None for any other."""
    from fa_stereo.memory import is_out_of_memory

    if is_out_of_memory(error):
        lines = str(error).strip().splitlines() or ["nothing is left to allocate"]
        reason = lines[-1] if lines[0].startswith("Caught") else lines[0]  # a loader process's comes with its traceback
        return f"out of memory ({reason}): {MORE_MEMORY.get(command, 'take smaller pictures, or another device')}"
    if str(error).startswith("DataLoader worker"):  # all that PyTorch says by: one has no exception type of its own
        key = "data.workers" if command == "train" else "workers"
        return (
            "a process that loads pairs was ended by the system, for want of memory or of room in /dev/shm perhaps: "
            f"lower {key} (0 loads them in the process itself)"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
