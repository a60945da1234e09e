"""The original PSMNet's code beside this project's plain and fast path: time, memory and deviation of inference.

    python scripts/compare_with_original.py --size 544x960 --repeats 3

The original is written down anew in tests/models/official_psmnet.py, which shares no code with this project. All three
have the same random weights and see the same rendered pair in fp32; each run is a process of its own, the three take
turns, and medians are reported. The allocator is left alone, but for the fast path, as in ``fa-stereo benchmark``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
PATHS = ("original", "plain", "fast")


def main() -> int:
    """Measure in processes of their own and print a table; with ``--run``, be such a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default="544x960", metavar="HxW", help="multiples of 16, from 256 up")
    parser.add_argument("--channels", type=int, default=32, metavar="C", help="width of the network")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="processes of each kind")
    parser.add_argument("--run", nargs=2, metavar=("PATH", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats must be positive, got {arguments.repeats}")
    height, width = arguments.size
    if arguments.run:
        print(json.dumps(run(arguments.run[0], Path(arguments.run[1]), height, width, arguments.channels)))
        return 0

    from fa_stereo.machine import describe_machine

    with tempfile.TemporaryDirectory() as folder:
        found = {path: [] for path in PATHS}
        for _ in range(arguments.repeats):
            for path in PATHS:
                command = [sys.executable, __file__, "--run", path, f"{folder}/{path}.npy"]
                command += ["--size", f"{height}x{width}", "--channels", str(arguments.channels)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    return done.returncode  # the process has said why
                found[path].append(json.loads(done.stdout.splitlines()[-1]))
        results = {path: np.load(f"{folder}/{path}.npy") for path in PATHS}
    machine = describe_machine()
    print(f"{machine['cpu']} ({machine['cpu_capability']}, threads: {machine['threads']}), PyTorch {machine['torch']}, "
          f"{time.strftime('%Y-%m-%d')}; 1x{height}x{width}, {arguments.channels} channels, fp32\n")  # fmt: skip
    print("| path | time | peak memory | largest deviation from the original |\n|---|---|---|---|")
    for path, runs in found.items():
        seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        deviation = np.abs(results[path] - results["original"]).max()
        print(f"| {path} | {seconds:.2f} s | {peak / 1e9:.2f} GB | {deviation:.2g} px |")
    return 0


def size(text: str) -> tuple[int, int]:
    """Return height and width in pixels."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or any(int(x) < 256 or int(x) % 16 for x in (height, width)):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, multiples of 16 from 256 up, got {text!r}")
    return int(height), int(width)


def run(path: str, file: Path, height: int, width: int, channels: int) -> tuple[float, int]:
    """Predict twice and store the disparity; return the seconds of the second time and the peak of memory in bytes."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "models"))
    import official_psmnet

    from fa_stereo.memory import keep_freed_memory, peak_memory
    from fa_stereo.models.checkpoint import import_official_weights
    from fa_stereo.models.optimized import optimize_for_inference
    from fa_stereo.profiling import example_pair

    if path == "fast":
        keep_freed_memory(whole=False)  # as the commands do, before the first tensor
    left, right = example_pair(height, width, 1)
    torch.manual_seed(0)
    state = official_psmnet.random_state(stacked=True, channels=channels)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"state_dict": state}, f"{folder}/original.tar")
        model = import_official_weights(f"{folder}/original.tar", align_corners=False)
    model.plain = path == "plain"
    if path == "fast":
        model = optimize_for_inference(model)
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            if path == "original":
                disparity = official_psmnet.forward(state, left, right, align_corners=False)
            else:
                disparity = model.eval()(left, right)
            seconds = time.perf_counter() - start
    np.save(file, disparity.numpy())
    return seconds, peak_memory("cpu")


if __name__ == "__main__":
    sys.exit(main())
