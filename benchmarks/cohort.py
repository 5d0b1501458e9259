"""How busy a cohort keeps the processor, and whether its memory grows.

    python benchmarks/cohort.py CASES [--cases 20] [--workers N] [--model FILE]

Complete cases are copied until there are enough, each without one sequence, and completed by
`cwdm impute` in a process of its own. Every second its CPU time and the memory of the largest of
its processes are read: printed are the share of the cores that worked, from the first case that
was done to the last, and that memory after each quarter of the cases.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

from cwdm.case import find_cases
from cwdm.evaluate import complete_cases
from cwdm.modality import SEQUENCES


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError):
            found += [each for child in task.read_text().split() for each in tree(int(child))]
    return found


def used(pid: int) -> tuple[float, int]:
    """CPU seconds of a process with all that it started, and bytes of the largest of them now."""
    seconds, largest = 0.0, 0
    for each in tree(pid):
        with suppress(FileNotFoundError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, fields[11:15])) / 100
            largest = max(largest, int(fields[21]) * 4096)
    return seconds, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    parser.add_argument("--cases", dest="count", type=int, default=20)
    parser.add_argument("--workers", type=int, help="by default those of cwdm impute")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    cases = complete_cases(find_cases(options.cases))
    for number, case in enumerate(islice(cycle(cases), options.count)):
        folder = root / "cohort" / f"case-{number:03}"
        folder.mkdir(parents=True)
        for modality in SEQUENCES:
            if modality != SEQUENCES[number % 4]:
                shutil.copy(case.images[modality], folder / f"{folder.name}-{modality}.nii.gz")
    words = [sys.executable, "-m", "cwdm.cli", "impute", "--input", str(root / "cohort")]
    words += ["--output", str(root / "out")]
    if options.workers:
        words += ["--workers", str(options.workers)]
    if options.model:
        words += ["--model", str(options.model)]
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    record: list[tuple[float, float, int, int]] = []
    while process.poll() is None:
        time.sleep(1)
        done = len(list((root / "out").glob("*/*.json")))
        record.append((time.perf_counter() - began, *used(process.pid), done))
    inside = [row for row in record if 0 < row[3] < options.count]
    wall, seconds = (inside[-1][i] - inside[0][i] for i in (0, 1))
    print(f"{options.count} cases in {record[-1][0]:.0f} s, exit code {process.returncode}")
    print(f"busy: {seconds / wall / options.cores:.0%} of {options.cores} cores")
    for quarter in range(1, 5):
        most = max(row[2] for row in record if row[3] <= quarter * options.count / 4)
        print(f"largest process until case {quarter * options.count // 4}: {most / 2**20:.0f} MiB")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
