"""How many small faults the tests notice: mutations.py [--sample 300] [--seed 1] [--only processing/] [--jobs 2].

Places of the code where cosmic-ray can plant a fault (another operator, another number, a condition the wrong way
round, an exception that is not caught) are drawn at random, each with one of the faults possible there. Each mutant is
tried in a copy of the package with the tests of its module, those of the module itself first; it is killed when they
fail or take far longer than without it. Annotations are left alone, since nothing evaluates them. The same seed draws
the same mutants of the same code.

Needs ``pip install -e .[mutation]``; 300 mutants take two hours on two cores. What survives stands in
docs/testing.md with the reason. `--again FILE` tries the survivors of an earlier report once more.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import Queue

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ssx_mpi"

# what decides: where a fault would be a wrong result, a lost image, or a run that hangs
MODULES = (
    "processing/*.py",
    "reduction/*.py",
    "parallel/*.py",
    "records/*.py",
    "stages/*.py",
    "stages/fast/fast_spotfinding.py",
    "stages/fast/fast_indexing.py",
    "stages/fast/beam_search.py",
)
_SIGNS = "tests/parallel/test_signs_of_life.py"
# the tests of a module besides tests/FOLDER/test_MODULE.py: the longest prefix counts
TESTS = {
    "processing/": ["tests/processing", "tests/test_main_job.py"],
    "processing/resume": ["tests/processing", "tests/records", "tests/test_main_job.py"],
    "processing/watch": [
        "tests/processing",
        "tests/parallel/test_kill_images.py",
        "tests/parallel/test_signs_of_life.py",
    ],
    "processing/reducing": ["tests/processing", "tests/test_main_job.py"],
    "reduction/": ["tests/reduction"],
    "parallel/": ["tests/parallel"],
    "parallel/launching": ["tests/parallel/test_launching.py", "tests/parallel/test_start_up.py"],
    "parallel/relay": ["tests/parallel/test_launching.py", _SIGNS],
    "records/": ["tests/records", "tests/parallel/test_storage.py"],
    "stages/": ["tests/stages", "tests/test_main_job.py"],
    "stages/fast/": ["tests/stages"],
}
# a mutant that takes so many times longer than the tests without it, and this many seconds more, hangs
_SLOWER, _MORE = 3.0, 30.0


@dataclass(frozen=True)
class Mutant:
    """A fault at one place: the operator of cosmic-ray, and which of its occurrences in the module."""

    module: str
    line: int
    operator: str
    occurrence: int


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by failing tests, by time, or survived."""

    mutant: Mutant
    outcome: str
    seconds: float
    diff: str


def annotations(source: str) -> set[int]:
    """Offsets (line * 1000 + column) of what stands in annotations."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            found = getattr(node, name, None)
            if found is not None:
                spans.append((found.lineno, found.col_offset, found.end_lineno, found.end_col_offset))
    return {
        line * 1000 + column
        for first, begin, last, end in spans
        for line in range(first, last + 1)
        for column in range(begin if line == first else 0, end if line == last else 200)
    }


def mutants_of(module: Path) -> dict[tuple[int, int], list[Mutant]]:
    """All mutants of a module by the place (line, column) of their fault."""
    source = module.read_text()
    nodes = list(ast_nodes(get_ast(source)))
    not_evaluated = annotations(source)
    found = defaultdict(list)
    for name in sorted(operator_names()):
        if get_operator(name).arguments():
            continue
        operator, occurrence = get_operator(name)(), 0
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                if line * 1000 + column not in not_evaluated:
                    found[line, column].append(Mutant(str(module.relative_to(PACKAGE)), line, name, occurrence))
                occurrence += 1
    return found


def sample(size: int, seed: int, only: str) -> list[Mutant]:
    """Mutants of `size` places drawn from all modules, each place as likely as any other."""
    chosen = random.Random(seed)
    places = []
    for pattern in MODULES:
        for module in sorted(PACKAGE.glob(pattern)):
            if str(module.relative_to(PACKAGE)).startswith(only):
                by_place = mutants_of(module)
                places += [by_place[place] for place in sorted(by_place)]
    return [chosen.choice(place) for place in chosen.sample(places, min(size, len(places)))]


def tests_of(module: str) -> list[str]:
    """Arguments of pytest for a module."""
    path = Path(module)
    prefix = max((p for p in TESTS if module.startswith(p)), key=len)
    own = Path("tests") / path.parent / f"test_{path.stem}.py"
    return [*([str(own)] if (ROOT / own).exists() else []), *TESTS[prefix]]


class Workshop:
    """A copy of package and tests in which one mutant is tried at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("ssx_mpi", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.cfg", "Makefile", "README.md", "jobscripts", "docs"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)

    def run(self, tests: list[str], limit: float) -> tuple[str, float]:
        """How the tests end, and after how many seconds."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            self.output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            self.output, _ = process.communicate()
            return "time", time.monotonic() - began
        return ("survived" if process.returncode == 0 else "tests"), time.monotonic() - began

    def try_out(self, mutant: Mutant, limit: float) -> Verdict:
        path = self.folder / "ssx_mpi" / mutant.module
        source = path.read_text()
        mutated = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
        assert mutated is not None, mutant
        difference = difflib.unified_diff(source.splitlines(), mutated.splitlines(), n=0, lineterm="")
        diff = "\n".join(line for line in difference if line[:2] not in ("--", "++", "@@"))
        path.write_text(mutated)
        try:
            outcome, seconds = self.run(tests_of(mutant.module), limit)
        finally:
            path.write_text(source)
        return Verdict(mutant, outcome, seconds, diff)


def survivors_of(report: Path) -> list[Mutant]:
    """The mutants of a report that survived."""
    return [Mutant(**v["mutant"]) for v in map(json.loads, report.open()) if v["outcome"] == "survived"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="modules whose path begins like this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--again", type=Path, help="a report, of which the survivors are tried once more")
    parser.add_argument("--report", type=Path, default=Path("mutations.jsonl"), help="a line of JSON for each mutant")
    arguments = parser.parse_args()
    os.nice(10)
    wanted = survivors_of(arguments.again) if arguments.again else sample(
        arguments.sample, arguments.seed, arguments.only
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, arguments.report.open("w") as report:
        free: Queue[Workshop] = Queue()
        for number in range(arguments.jobs):
            free.put(Workshop(Path(folder) / str(number)))

        @cache
        def limit(tests: tuple[str, ...]) -> float:
            workshop = free.get()
            outcome, seconds = workshop.run(list(tests), 3600.0)
            free.put(workshop)
            if outcome != "survived":
                sys.exit(f"without a fault, too, these fail: {' '.join(tests)}\n{workshop.output[-3000:]}")
            return _SLOWER * seconds + _MORE

        for each in {tuple(tests_of(mutant.module)) for mutant in wanted}:
            limit(each)

        def try_out(mutant: Mutant) -> Verdict:
            workshop = free.get()
            try:
                return workshop.try_out(mutant, limit(tuple(tests_of(mutant.module))))
            finally:
                free.put(workshop)

        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for verdict in pool.map(try_out, wanted):
                print(json.dumps(asdict(verdict)), file=report, flush=True)
                folder_name = str(Path(verdict.mutant.module).parent)
                counts[folder_name][0] += verdict.outcome != "survived"
                counts[folder_name][1] += 1
                if verdict.outcome == "survived":
                    print(f"{verdict.mutant.module}:{verdict.mutant.line}\n{verdict.diff}", flush=True)
    killed, tried = (sum(column) for column in zip(*counts.values()))
    for name, (k, n) in sorted(counts.items()):
        print(f"{name}: {k} of {n} killed")
    print(f"{killed} of {tried} killed, {100 * killed / tried:.0f}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
