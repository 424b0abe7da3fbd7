"""Compares the working tree's service with an earlier commit's: `make bench-against REF=<commit>`, small requests.

Both services run at the same time, on the earlier commit's model and with this environment's packages. A round starts
both anew and puts every load on one and at once on the other; which comes first alternates. A round's result is the
ratio of the two, and the median of the rounds' ratios is judged.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from math import comb
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import bodies, closed
from benchmarks.bodies import Body
from benchmarks.environments import HERE, ignored_home
from benchmarks.measure import Measure
from benchmarks.servers import Server, StartFailed, end_when_asked

FORMS = {"json": bodies.json, "npy": bodies.npy, "raw": bodies.raw}
CONNECTIONS = (1, 64)
LOADS = [f"{form}-{connections}" for connections in CONNECTIONS for form in FORMS]
LEAST_ROUNDS = 12
LEAST_MEDIAN, LEAST_UPPER = 0.95, 0.97
"""Lower limits of a load's median ratio and of its interval's upper end, for a pass."""
OUTSIDE = 0.05
"""Probability, at most, that the true median lies outside the interval."""
WARM_S = 1
COMMAND = [sys.executable, str(HERE.absolute() / "peers" / "ours.py")]


class Ratio(NamedTuple):
    """Median of the rounds' ratios, and its confidence interval."""

    low: float
    median: float
    high: float

    @property
    def passes(self) -> bool:
        """Whether the rounds are consistent with a new service that is as fast."""
        return self.median >= LEAST_MEDIAN and self.high >= LEAST_UPPER

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def main() -> int:
    """Measure and print; the exit status is 1 if a load is slower than before."""
    options = parse()
    closed.check()
    end_when_asked()
    with worktree(options.ref) as (old, folder):
        new = Path.cwd()
        tell_of_packages(old, new, options.ref)
        model = folder / "models" / options.model.parent.name / options.model.name
        if not (old / options.model).is_dir():
            raise SystemExit(f"{options.ref} has no {options.model}; name one of its versions by --model")
        shutil.copytree(old / options.model, model)
        rates: dict[str, list[float]] = defaultdict(list)
        waits: dict[str, list[float]] = defaultdict(list)
        for turn in range(options.rounds):
            for load, (before, after) in measured(old, new, model, options, turn).items():
                rates[load].append(after.rate / before.rate)
                waits[load].append(before.p50_ms / after.p50_ms)
    return report(rates, waits, options)


def parse() -> argparse.Namespace:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(prog="make bench-against", description=__doc__)
    parser.add_argument("ref", nargs="?", metavar="REF", help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--seconds", type=int, default=1, help="of one load on one service")
    parser.add_argument("--loads", default="*", help=f"patterns with commas between, of {', '.join(LOADS)}")
    parser.add_argument("--model", type=Path, default=Path("models/mnist-2d/1"), help="a version that REF ships")
    options = parser.parse_args()
    if options.ref is None:
        parser.error("name the earlier commit: make bench-against REF=<commit>")
    if options.rounds < LEAST_ROUNDS or options.seconds < 1:
        parser.error(f"the median needs at least {LEAST_ROUNDS} rounds of at least one second")
    options.chosen = [load for load in LOADS if any(fnmatch(load, each) for each in options.loads.split(","))]
    if not options.chosen:
        parser.error(f"no load is named {options.loads}; there are {', '.join(LOADS)}")
    return options


@contextmanager
def worktree(ref: str) -> Iterator[tuple[Path, Path]]:
    """Context with a checkout of `ref` in a temporary folder.

    Raises: SystemExit where git knows no such commit.
    """
    git("worktree", "prune")  # what a killed run left registered
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="against-", dir=ignored_home())).absolute()
        stack.callback(git, "worktree", "prune")
        stack.callback(shutil.rmtree, folder)
        git("worktree", "add", "--quiet", "--detach", str(folder / "tree"), ref)
        yield folder / "tree", folder


def git(*arguments: str) -> None:
    """Run git and return its output.

    Raises: SystemExit with what it said, where it fails.
    """
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)  # noqa: S607
    if done.returncode:
        raise SystemExit(f"git {arguments[0]} failed: {done.stderr.strip()}")


def tell_of_packages(old: Path, new: Path, ref: str) -> None:
    """Warn if the earlier commit requires other packages than this environment has."""
    different = sorted(packages(old) ^ packages(new))
    if different:
        print(f"{ref} names other packages, and runs with this environment's: {', '.join(different)}", flush=True)


def packages(tree: Path) -> set[str]:
    """Requirements and constraints of a tree."""
    constraints = (tree / "constraints.txt").read_text().split("\n")
    return {line.strip() for line in constraints if re.match(r"[A-Za-z]", line)}


def measured(
    old: Path, new: Path, model: Path, options: argparse.Namespace, turn: int
) -> dict[str, tuple[Measure, Measure]]:
    """One round: each load on the old and the new service, in alternating order."""
    found: dict[str, dict[Path, Measure]] = defaultdict(dict)
    trees = [old, new] if turn % 2 == 0 else [new, old]
    with ExitStack() as stack:
        servers = {tree: started(tree, model, stack) for tree in trees}
        for load in options.chosen:
            form, connections = load.split("-")
            body = asked(form)
            for tree in trees:
                found[load][tree] = closed.run(servers[tree].port, body, int(connections), options.seconds)
                if found[load][tree].failures:
                    raise SystemExit(f"{load}: {found[load][tree].failures} answers of {tree} were not 200")
            before, after = found[load][old], found[load][new]
            print(
                f"round {turn + 1:2} of {options.rounds}  {load:8} {before.rate:8.0f}/s before {after.rate:8.0f}/s now"
                f"  {after.rate / before.rate:.3f}",
                flush=True,
            )
    return {load: (each[old], each[new]) for load, each in found.items()}


def started(tree: Path, model: Path, stack: ExitStack) -> Server:
    """Start a tree's service and warm it up; `stack` ends it.

    Raises: SystemExit where it does not start.
    """
    log = model.parents[2] / f"{tree.name}.log"
    try:
        server = Server(COMMAND, model, asked("json"), log, tree=tree)
    except StartFailed as error:
        raise SystemExit(f"the service of {tree} does not start ({error})") from error
    stack.callback(server.stop)
    closed.run(server.port, asked("json"), 64, WARM_S)
    return server


def asked(form: str) -> Body:
    """A reconstruct request with one image."""
    return FORMS[form]("/v1/reconstruct").ask(bodies.images(1))


def report(rates: dict[str, list[float]], waits: dict[str, list[float]], options: argparse.Namespace) -> int:
    """Print the ratios and the verdict; the exit status is 1 if a load is slower."""
    print(f"\nnow / {options.ref}: median of {options.rounds} paired ratios, 95 % interval; above 1 is faster\n")
    print(f"{'load':8}  {'requests a second':24}{'1 / median latency':24}")
    slower = []
    for load, ratios in rates.items():
        rate, wait = interval(ratios), interval(waits[load])
        alone = load.endswith("-1")
        print(f"{load:8}  {rate!s:24}{str(wait) if alone else '':24}")
        slower += [] if rate.passes and (wait.passes or not alone) else [load]
    asked_for = f"median >= {LEAST_MEDIAN}, upper end >= {LEAST_UPPER}"
    print(f"\n{'SLOWER: ' + ', '.join(slower) if slower else 'as fast as before'} ({asked_for})")
    return int(bool(slower))


def interval(ratios: list[float]) -> Ratio:
    """Median of independent values, and a distribution-free confidence interval of 95 %.

    The interval's ends are order statistics: the true median lies below the k-th smallest of n values with the
    probability that a fair coin shows heads fewer than k times in n.
    """
    values, n = sorted(ratios), len(ratios)
    cut = max(k for k in range(n // 2) if 2 * sum(comb(n, heads) for heads in range(k)) <= OUTSIDE * 2**n)
    return Ratio(values[cut - 1], median(values), values[n - cut])


if __name__ == "__main__":
    sys.exit(main())
