"""How the dispatch scales: measured on this machine, and simulated where no machine is at hand.

  python benchmarks/scaling.py real ARGUMENTS...    the program itself on 1 and 2 pinned ranks, with these parameters
  python benchmarks/scaling.py validate             the simulation against the real dispatch on 1 to 4 ranks
  python benchmarks/scaling.py simulate [RUN]       up to 16,384 ranks and 10 million images
  python benchmarks/scaling.py request              what a request costs the coordinator
  python benchmarks/scaling.py start [ARGUMENTS]    what a rank other than 0 loads, and when its first image begins

The simulation is a discrete-event one (simpy) of what ssx_mpi.parallel.dispatch does, with the program's own ranges and
constants. Its inputs are the cost of an image (drawn from the CPU-seconds by stage that the folder RUN has in
batch_*/images.json, or from the distribution below), the latency of a message, the time that the
coordinator needs for a request, that a keeper needs for a record, and the rate at which a batch is written. In the
validation the real dispatch runs with images that sleep, so that more ranks than cores are possible.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simpy

from ssx_mpi import dials_compat
from ssx_mpi.parallel import dispatch, message_loop, schedule, telemetry


@dataclass(frozen=True)
class Machine:
    """Seconds that things take.

    latency: of a message between nodes. request: of the coordinator for a request and its answer. note: of it for each
    image that is told of with the request, and of rank 0 for each that another coordinator tells of. record: of a
    keeper for the record of an image. finish: of a keeper for the files of a batch. poll: between looks of an idle
    rank.

    Those of the coordinator are measured: see :func:`request`.
    """

    latency: float = 5e-6
    request: float = 104e-6
    note: float = 2.3e-6
    record: float = 150e-6
    finish: float = 0.8
    poll: float = message_loop._POLL


@dataclass(frozen=True)
class Outcome:
    """Of a simulated run; times in seconds."""

    makespan: float
    efficiency: float
    coordinator_busy: float
    requests: int
    worst_feedback: float


def typical_costs(rng: np.random.Generator, n: int) -> np.ndarray:
    """CPU-seconds (n, 3) of spot finding, indexing and integration: a third hits, with a tail of slow ones."""
    hit = rng.random(n) < 0.33
    spots = rng.lognormal(np.log(0.05), 0.2, n)
    index = np.where(hit, rng.lognormal(np.log(0.25), 0.5, n), 0.0)
    integrate = np.where(hit, rng.lognormal(np.log(0.35), 0.5, n), 0.0)
    return np.column_stack([spots, index, integrate])


def read_costs(path: Path) -> np.ndarray:
    """CPU-seconds (n, 3) of the images of a run, from the images.json files of its batches."""
    rows = []
    for file in sorted(path.glob("batch_*/images.json")):
        images = json.loads(file.read_text())
        rows += [[i["seconds"].get(s, 0.0) for s in ("find_spots", "index", "integrate")] for i in images]
    if not rows:
        sys.exit(f"{path} has no batch_*/images.json")
    return np.array(rows)


class Dispatch:
    """The dispatch of `n_images` over `ranks`, image costs drawn from `costs`; :meth:`run` gives the outcome."""

    def __init__(
        self, ranks: int, n_images: int, costs: np.ndarray, machine: Machine, batch: int = 1000, seed: int = 1
    ):
        self.env = simpy.Environment()
        self.machine, self.n_images, self.batch = machine, n_images, batch
        self.ranks = ranks
        count = schedule.n_groups(ranks, None)
        self.groups = [schedule.Group.of(-(-number * ranks // count), ranks, count) for number in range(count)]
        rng = np.random.default_rng(seed)
        # the same images whoever gets them; a rank also keeps its share of all records, in the time of its own images
        self.stages = costs[rng.integers(0, len(costs), n_images)] if len(costs) != n_images else costs
        self.cost = self.stages.sum(axis=1) + machine.record
        self.ends = np.concatenate([[0.0], np.cumsum(self.cost)])
        pending = [(0, n_images)]
        self.ranges = [schedule.Ranges(g.share(pending), len(g.workers), 64) for g in self.groups]
        self.coordinators = [simpy.Resource(self.env, 1) for _ in self.groups]
        self.busy, self.requests = [0.0] * count, 0
        self.untold = [0] * count
        self.at_work = ranks - sum(g.dedicated for g in self.groups)
        self.batch_end = np.zeros(-(-n_images // batch))
        self.finished_at = 0.0
        # when rank 0 works too, it answers between the stages of its images
        self.free_at: list[float] = []
        self.rng = rng

    def run(self) -> Outcome:
        for group in self.groups:
            for rank in group.workers:
                self.env.process(self._worker(group, rank, self.ranges[group.number].next()))
            if group.number:
                self.env.process(self._tell(group))
        self.env.run()
        total = float(self.cost.sum())
        feedback = self._feedback()
        return Outcome(
            self.finished_at,
            total / (self.ranks * self.finished_at),
            max(self.busy) / self.finished_at,
            self.requests,
            float(feedback.max()),
        )

    def _worker(self, group: schedule.Group, rank: int, first):
        """Ranges one after another; the next is asked for when the last in hand is begun, or is over."""
        work, finished = first, 0
        while True:
            ahead = work is not None and schedule.asks_ahead(work, group.dedicated)
            if ahead:
                answer = self.env.process(self._ask(group, rank, finished))
                finished = 0
            if work is not None:
                yield from self._do(group, rank, work)
                finished += work.stop - work.start
            if not ahead:
                answer = self.env.process(self._ask(group, rank, finished))
                finished = 0
            idle = not answer.triggered
            work = yield answer
            if work is None:
                self.at_work -= 1
                return
            if idle:
                # it looks for its answer now and then
                yield self.env.timeout(self.machine.poll / 2)

    def _do(self, group: schedule.Group, rank: int, work):
        began = self.env.now
        if rank == 0 and not group.dedicated:
            self.free_at = sorted(began + self._stage_ends(work))
        yield self.env.timeout(self.ends[work.stop] - self.ends[work.start])
        ends = began + self.ends[work.start + 1 : work.stop + 1] - self.ends[work.start]
        batches = np.arange(work.start, work.stop) // self.batch
        np.maximum.at(self.batch_end, batches, ends)
        self.finished_at = max(self.finished_at, self.env.now)

    def _stage_ends(self, work) -> np.ndarray:
        """When, from its beginning, work on a range can be interrupted by messages."""
        steps = self.stages[work.start : work.stop].copy()
        steps[:, 2] += self.machine.record
        return np.cumsum(steps.ravel())

    def _tell(self, group: schedule.Group):
        """A coordinator tells rank 0 now and then what was finished."""
        while self.at_work:
            yield self.env.timeout(message_loop._TELL)
            seconds = self.machine.request + self.machine.note * self.untold[group.number]
            self.untold[group.number] = 0
            with self.coordinators[0].request() as turn:
                yield turn
                yield self.env.timeout(seconds)
                self.busy[0] += seconds

    def _ask(self, group: schedule.Group, rank: int, finished: int):
        own = rank == group.first
        if not own:
            yield self.env.timeout(self.machine.latency)
            if not group.dedicated:
                later = [t for t in self.free_at if t >= self.env.now]
                yield self.env.timeout(later[0] - self.env.now if later else self.machine.poll / 2)
        with self.coordinators[group.number].request() as turn:
            yield turn
            if not own:
                seconds = self.machine.request + self.machine.note * finished
                yield self.env.timeout(seconds)
                self.busy[group.number] += seconds
                self.untold[group.number] += finished
                self.requests += 1
            work = self.ranges[group.number].next()
        if not own:
            yield self.env.timeout(self.machine.latency)
        return work

    def _feedback(self) -> np.ndarray:
        """Seconds from the last image of each batch to its block in the log.

        The keeper looks at its messages between two stages of an image of its own, then writes the files of its batches
        one after another.
        """
        order = np.argsort(self.batch_end)
        keepers = (self.ranks - 1 - np.arange(len(self.batch_end))) % self.ranks
        free: dict[int, float] = {}
        delays = np.empty(len(order))
        steps = self.stages[self.stages > 0]
        # a stage that is under way when the record comes is a long one more often than a short one
        chosen = self.rng.choice(steps, len(order), p=steps / steps.sum()) * self.rng.random(len(order))
        for batch in order:
            ready = self.batch_end[batch] + self.machine.latency + chosen[batch]
            begin = max(ready, free.get(keepers[batch], 0.0))
            free[keepers[batch]] = begin + self.machine.finish
            delays[batch] = (
                free[keepers[batch]] + 2 * self.machine.latency + self.machine.request - self.batch_end[batch]
            )
        return delays


def least_time(costs: np.ndarray, workers: int) -> float:
    """Seconds of `workers` that take images one by one, in order, as they become free, with nothing that costs time.

    Who does not know what an image costs before it is done cannot hand them out better: a long one may come last.
    """
    free = [0.0] * workers
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def simulate(costs: np.ndarray | None) -> None:
    """The table of docs/scaling.md."""
    rng = np.random.default_rng(7)
    drawn = costs if costs is not None else typical_costs(rng, 100_000)
    total = drawn.sum(axis=1)
    print(f"cost of an image: mean {total.mean():.3f} s, median {np.median(total):.3f} s, longest {total.max():.2f} s")
    titles = (
        "ranks",
        "images",
        "a rank",
        "time (s)",
        "efficiency",
        "at best",
        "coordinator",
        "requests",
        "feedback (s)",
    )
    print(" ".join(f"{title:>12}" for title in titles))
    for ranks, images in (
        *((n, 200 * n) for n in (64, 256, 1024, 4096, 16384)),
        (16384, 10_000_000),
    ):
        simulated = Dispatch(ranks, images, drawn, Machine())
        o = simulated.run()
        best = simulated.cost.sum() / ranks / least_time(simulated.cost, ranks)
        numbers = (f"{o.makespan:.1f}", f"{o.efficiency:.4f}", f"{best:.4f}", f"{o.coordinator_busy:.3f}", o.requests)
        row = (ranks, images, images // ranks, *numbers, f"{o.worst_feedback:.2f}")
        print(" ".join(f"{value:>12}" for value in row), flush=True)


# ---- the real dispatch with sleeping images -----------------------------------------------------------------------


class Sleeping:
    """A job for the dispatch whose images sleep for as long as they would work, stage by stage."""

    def __init__(self, costs: np.ndarray, size: int) -> None:
        self.costs, self.size = costs, size
        self.seconds = 0.0

    def work(self, item, breathe):
        for seconds in self.costs[item]:
            time.sleep(seconds)
            breathe()
        return 0, bytes(20_000)

    def note(self, value):
        return 0

    def keeper(self, item):
        return self.size - 1 - (item // 100) % self.size

    def keep(self, item, result):
        return None

    def news(self, content):
        return None

    def progress(self, done):
        return None

    def stopping(self):
        return False

    def waiting(self):
        return None

    def silent(self, rank, seconds):
        return None


def sleeping_costs(n: int) -> np.ndarray:
    """As the typical ones, a fifth as long."""
    return typical_costs(np.random.default_rng(3), n) / 5


def run_sleeping(n_images: int, dedicated_from: int) -> None:
    """One rank of the validation; rank 0 prints what it measured."""
    from mpi4py import MPI

    from ssx_mpi.parallel.communicator import MpiCommunicator, SerialCommunicator

    comm = MpiCommunicator(MPI.COMM_WORLD) if MPI.COMM_WORLD.size > 1 else SerialCommunicator()
    costs = sleeping_costs(n_images)
    schedule.DEDICATED_FROM = dedicated_from
    comm.barrier()
    began = time.monotonic()
    _, _, traffic = dispatch.run(comm, Sleeping(costs, comm.size), [(0, n_images)])
    comm.barrier()
    seconds = time.monotonic() - began
    traffics = comm.gather(traffic)
    if traffics is not None:
        requests = sum(t.messages["REQUEST"] for t in traffics)
        print(json.dumps({"seconds": seconds, "requests": requests, **telemetry.summary(traffics)}))


def validate(n_images: int) -> None:
    """Time of the real dispatch and of the simulated one, on 1 to 4 ranks, and on 4 of which one only coordinates."""
    costs = sleeping_costs(n_images)
    overhead = _sleep_overhead()
    machine = Machine(latency=30e-6, record=0.0)
    print(
        f"{n_images} images of {costs.sum(axis=1).mean():.3f} s; a sleep takes {overhead * 1e6:.0f} us more than asked"
    )
    print(f"{'work':>5} {'real (s)':>9} {'simulated':>9} {'ratio':>6} {'real requests':>13} {'simulated':>9}")
    for ranks, schedule.DEDICATED_FROM in ((1, 64), (2, 64), (3, 64), (4, 64), (4, 4)):
        command = [sys.executable, __file__, "sleep", str(n_images), str(schedule.DEDICATED_FROM)]
        launcher = ["mpiexec", "--bind-to", "none", "-n", str(ranks)] if ranks > 1 else []
        done = subprocess.run([*launcher, *command], env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
        real = json.loads(done.stdout)
        o = Dispatch(ranks, n_images, costs + overhead, machine).run()
        workers = ranks - (ranks >= schedule.DEDICATED_FROM)
        print(
            f"{workers:>5} {real['seconds']:>9.2f} {o.makespan:>9.2f} {real['seconds'] / o.makespan:>6.3f} "
            f"{real['requests']:>13} {o.requests:>9}",
            flush=True,
        )


def _environment() -> dict[str, str]:
    """For Open MPI, which refuses root and more ranks than cores."""
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe")
    return {**os.environ, **dict.fromkeys(allowed, "1")}


def _sleep_overhead() -> float:
    began = time.monotonic()
    for _ in range(200):
        time.sleep(0.005)
    return (time.monotonic() - began) / 200 - 0.005


# ---- the program itself -------------------------------------------------------------------------------------------


def real(arguments: list[str], repeats: int) -> None:
    """Strong and weak scaling from 1 to 2 ranks: images a second while processing, each rank on a core of its own.

    Weak: two independent runs of one rank, one on each core at the same time, against one run of two ranks. What is
    lost to the memory and the clock of a shared machine is lost to both.
    """
    env = _environment()
    cores = sorted(os.sched_getaffinity(0))[:2]
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            start = lambda name, n, command: subprocess.Popen(  # noqa: E731
                [*command, sys.executable, "-m", "ssx_mpi", *arguments, f"output.directory={folder}/{name}", *n],
                env=env,
                stdout=subprocess.DEVNULL,
            )
            alone = [start(f"alone{c}", ["nproc=1"], ["taskset", "-c", str(c)]) for c in cores]
            assert all(p.wait() == 0 for p in alone)
            together = start("two", [], ["mpiexec", "-n", "2", "--bind-to", "core"])
            assert together.wait() == 0
            rows.append([_rate(Path(folder) / n) for n in ("alone0", "alone1", "two")])
            a, b, two = rows[-1]
            print(f"one rank beside another: {a:.2f} + {b:.2f} images/s; two ranks: {two:.2f}", flush=True)
    efficiency = statistics.median(two / (a + b) for a, b, two in rows)
    print(f"efficiency of two ranks: {efficiency:.3f}")


def _rate(directory: Path) -> float:
    status = json.loads((directory / "ssx_mpi.json").read_text())
    return status["n_images"] / status["dispatch"]["seconds"]


# ---- what a request costs -----------------------------------------------------------------------------------------


class Instant(Sleeping):
    """A job whose images take no time, with values as the program's own; ranks other than 0 ask all the time."""

    def __init__(self, size: int) -> None:
        super().__init__(np.zeros((0, 3)), size)
        dials_compat.prepare()
        from ssx_mpi.processing.failures import FailureShare, Outcome

        self.failures, self.outcome = FailureShare(0.98), Outcome

    def work(self, item, breathe):
        reason = "index: no lattice found" if item % 12 == 0 else ""
        return self.outcome(item % 3 == 0, item % 4 == 0, reason), b""

    def keeper(self, item):
        # on the rank that did it
        return self.size

    def note(self, value):
        self.failures.add(value)
        return 0


class AskedLoop(message_loop.MpiLoop):
    """The loop of the program, which counts the CPU time of rank 0 in looks at the messages that found a request."""

    asked, noted, seconds = 0, 0, 0.0

    def pump(self) -> None:
        before, began = AskedLoop.asked, time.process_time()
        super().pump()
        if AskedLoop.asked > before:
            AskedLoop.seconds += time.process_time() - began

    def _do(self, item):
        value, _ = self.job.work(item, self.pump)
        self.traffic.items += 1
        self.finished.append((item, value))

    def _answer(self, rank, finished):
        AskedLoop.asked += 1
        AskedLoop.noted += len(finished)
        super()._answer(rank, finished)


def run_asking(n_items: int, longest: int) -> None:
    """One rank of the measurement; rank 0 does nothing but to answer, and prints what it cost."""
    from mpi4py import MPI

    from ssx_mpi.parallel.communicator import MpiCommunicator

    schedule.DEDICATED_FROM = 2
    comm = MpiCommunicator(MPI.COMM_WORLD)
    message_loop.MpiLoop = AskedLoop
    dispatch.run(comm, Instant(comm.size), [(0, n_items)], longest=longest)
    if comm.rank == 0:
        print(json.dumps({"requests": AskedLoop.asked, "images": AskedLoop.noted, "seconds": AskedLoop.seconds}))


def request() -> None:
    """CPU time of the coordinator for a request, and for each image that is told of with it."""
    costs = []
    for longest, n_items in ((1, 5_000), (64, 60_000)):
        command = ["mpiexec", "--bind-to", "none", "-n", "3", sys.executable, __file__]
        command += ["asking", str(n_items), str(longest)]
        rows = []
        for _ in range(3):
            done = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
        row = min(rows, key=lambda r: r["seconds"] / r["requests"])
        each, images = 1e6 * row["seconds"] / row["requests"], row["images"] / row["requests"]
        print(f"{row['requests']} requests with {images:.1f} images each: {each:.1f} us of the coordinator's CPU each")
        costs.append((images, each))
    (few, low), (many, high) = costs
    note = (high - low) / (many - few)
    print(f"a request {low - few * note:.1f} us, and {note:.2f} us for each image")


# ---- start-up -----------------------------------------------------------------------------------------------------


def start(arguments: list[str]) -> None:
    """What rank 1 of 2 loads: modules, files, calls to the file system; and seconds from mpiexec to its first image.

    Cold: the system's cache of files is emptied first, as root. Without arguments on a few images made for it.
    """
    ranks = ["mpiexec", "-n", "2", "--bind-to", "none"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments:
            arguments = _few_images(folder)
        program = [sys.executable, str(Path(__file__).with_name("loaded.py")), name, *arguments]
        program += [f"output.directory={folder}/run", "restart=True"]
        for cache in ("cold", "warm"):
            times = []
            for _ in range(3):
                if cache == "cold" and not _drop_caches():
                    print("the cache of files cannot be emptied here: no cold start")
                    break
                began = time.time()
                found = _rank_1([*ranks, *program], folder)
                times.append(found["time"] - began)
                print(
                    f"{cache}: first image after {times[-1]:.2f} s ({found['cpu_seconds']:.2f} CPU-seconds)", flush=True
                )
            if times:
                print(f"{cache}: median of {len(times)} {statistics.median(times):.2f} s")
        print(f"{len(found['modules'])} modules, {len(found['files'])} files opened by Python")
        if shutil.which("strace"):
            calls = folder / "calls"
            found = _rank_1([*ranks, "strace", "-f", "-ff", "-e", "trace=%file", "-o", str(calls), *program], folder)
            lines = Path(f"{calls}.{found['process']}").read_text().splitlines()
            # an empty name asks about a file that is open
            made = [line for line in lines if '""' not in line]
            print(f"{len(made)} calls to the file system by name, {sum('ENOENT' in call for call in made)} in vain")


def _few_images(folder: Path) -> list[str]:
    cell = "unit_cell=79.1,79.1,38.2,90,90,90"
    command = [sys.executable, "-m", "ssx_mpi.command_line.simulate", "n_images=24", "hit_rate=0.5", cell]
    command += ["space_group=P43212", "detector.preset=eiger1m", f"output.file={folder}/x.nxs"]
    subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, check=True)
    given = [f"image={folder}/x.nxs", "space_group=P43212", cell, f"reference_geometry={folder}/truth.expt"]
    return [*given, "steps=find_spots+index+integrate"]


def _rank_1(command: list[str], folder: Path) -> dict:
    subprocess.run(command, env=_environment(), stdout=subprocess.DEVNULL, check=True)
    return json.loads((folder / "rank_1.json").read_text())


def _drop_caches() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "validate", "simulate", "request", "start", "sleep", "asking"])
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.what == "real":
        real(given.rest, repeats=3)
    elif given.what == "validate":
        validate(int(given.rest[0]) if given.rest else 600)
    elif given.what == "request":
        request()
    elif given.what == "asking":
        run_asking(*map(int, given.rest))
    elif given.what == "start":
        start(given.rest)
    elif given.what == "sleep":
        run_sleeping(*map(int, given.rest))
    else:
        simulate(read_costs(Path(given.rest[0])) if given.rest else None)


if __name__ == "__main__":
    main()
