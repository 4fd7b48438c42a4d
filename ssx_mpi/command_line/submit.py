"""ssx_mpi.submit: write the job script for a run and hand it to Slurm.

  ssx_mpi.submit nodes=4 time=00:30:00 partition=short image=data_master.h5 space_group=P43212 unit_cell=... --dry-run

Parameters of the job are below; all others are those of ssx_mpi and are checked before anything is submitted.
--dry-run shows the scripts and submits nothing."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ssx_mpi import dials_compat
from ssx_mpi.parameters.declaration import AUTO, Definition
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.submission import estimate, scripts

DEFINITIONS = (
    Definition(
        "template",
        "choice",
        None,
        "The job script (a value with # is an image template instead). By default one_node or many_nodes by nodes, "
        "array with runs, chain with chain=True.",
        choices=tuple(scripts.KINDS),
    ),
    Definition("nodes", "int", AUTO, "Number of nodes; suggested from the number of images and their cost.", least=1),
    Definition(
        "time", "str", AUTO, "Time of the job, as for sbatch; suggested from the number of images and their cost."
    ),
    Definition("ranks_per_node", "int", AUTO, "Ranks on each node; by default one on each core.", least=1, level=1),
    Definition("partition", "str", None, "Partition, as for sbatch."),
    Definition("account", "str", None, "Account, as for sbatch."),
    Definition("qos", "str", None, "Quality of service, as for sbatch.", level=1),
    Definition("constraint", "str", None, "Features of the nodes, as for sbatch.", level=1),
    Definition("name", "str", "ssx_mpi", "Name of the job."),
    Definition("modules", "str", None, "Modules to load, with commas between them."),
    Definition("setup", "str", None, "A line of bash that makes ssx_mpi available, where modules do not.", level=1),
    Definition("launcher", "choice", "srun", "What starts the ranks.", choices=("srun", "mpirun"), level=1),
    Definition("mpi", "str", None, "For srun --mpi=.", level=2),
    Definition(
        "stage",
        "choice",
        None,
        "local: copy the Python environment to each node's own disk first.",
        choices=("local",),
        level=2,
    ),
    Definition(
        "chain", "bool", False, "Short jobs that put themselves into the queue again until all is done.", level=1
    ),
    Definition(
        "runs", "file", None, "An array: a file with a line for each run, with the parameters that differ.", level=1
    ),
    Definition(
        "reduce",
        "bool",
        False,
        "Reduce in a job of its own that waits for this one, all runs of an array together; otherwise each run reduces "
        "its own crystals at its end.",
        level=1,
    ),
    Definition("cost", "str", None, "CPU-seconds for an image, or the ssx_mpi.json of an earlier run.", level=1),
)

_OURS = tuple(definition.name for definition in DEFINITIONS)
_TRUE = ("true", "yes", "1")


class SubmitError(InputError):
    """The job cannot be submitted; one line for the user."""


@dataclass(frozen=True)
class Job:
    """A script, and what it is for."""

    kind: str
    script: str


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the program ``ssx_mpi.submit``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(__doc__, *(f"  {d.name + '=':<17s}{d.help}" for d in DEFINITIONS), sep="\n")
        return
    try:
        sys.exit(_main([a for a in arguments if a != "--dry-run"], "--dry-run" in arguments))
    except (InputError, dials_compat.DialsError) as error:
        print(f"ssx_mpi.submit: {error}", file=sys.stderr)
        sys.exit(2)


def _main(arguments: list[str], dry: bool) -> int:
    ours, theirs = _divide(arguments)
    kind = _kind(ours)
    parameters = None if kind == "reduce" else _checked(theirs, kind)
    apart = ours.get("reduce", "").lower() in _TRUE and parameters is not None
    if apart and parameters is not None:
        theirs = [*theirs, f"steps={'+'.join(parameters.image_steps)}"]
    jobs = [Job(kind, scripts.render(kind, _site(ours, kind, parameters), _script_arguments(kind, ours, theirs)))]
    if apart:
        after = _site({**ours, "nodes": "1", "name": f"{ours.get('name', 'ssx_mpi')}_reduce"}, "reduce", parameters)
        jobs.append(Job("reduce", scripts.render("reduce", after, _of_reduction(kind, ours, theirs))))
    if dry:
        print("\n".join(job.script for job in jobs), end="")
        return 0
    previous = None
    for job in jobs:
        previous = _submit(job, previous)
    return 0


def _divide(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Parameters of the job, and those of the program."""
    ours: dict[str, str] = {}
    theirs = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # image templates have the same name, and # for digits
        if equals and name in _OURS and not (name == "template" and "#" in value):
            ours[name] = value
        else:
            theirs.append(argument)
    return ours, theirs


def _kind(ours: dict[str, str]) -> str:
    kind = ours.get("template")
    if kind is None:
        if "runs" in ours:
            kind = "array"
        elif ours.get("chain", "").lower() in _TRUE:
            kind = "chain"
        else:
            kind = "one_node" if ours.get("nodes") == "1" else "many_nodes"
    if kind not in scripts.KINDS:
        raise SubmitError(f"template={kind}: choose from {', '.join(scripts.KINDS)}")
    if kind == "array" and not _lines(ours.get("runs", "/dev/null")):
        raise SubmitError("an array needs runs=, a file with a line for each run")
    return kind


def _checked(theirs: list[str], kind: str) -> Parameters:
    """The parameters of the run, found good; for an array, without the images."""
    from ssx_mpi.command_line.process import read_arguments

    dials_compat.prepare()
    parameters, _ = read_arguments(theirs or ["restart=False"])
    if not parameters.sources and kind != "array":
        raise SubmitError("no images given: use image=, template= or directory=")
    return parameters


def _script_arguments(kind: str, ours: dict[str, str], theirs: list[str]) -> list[str]:
    return [str(Path(ours["runs"]).resolve()), *theirs] if kind == "array" else theirs


def _of_reduction(kind: str, ours: dict[str, str], theirs: list[str]) -> list[str]:
    """Arguments of ``ssx_mpi.reduce`` for all runs of a job; that of one run goes where the run itself would put it."""
    if kind != "array":
        folder = _checked(theirs, kind).directory
        return [f"directory={folder}", f"output.folder={folder}"]
    # the words of a line come before what all runs share, as in the script
    runs = [_checked([*line.split(), *theirs], "run of an array") for line in _lines(ours["runs"])]
    return [f"directory={run.directory}" for run in runs]


def _site(ours: dict[str, str], kind: str, parameters: Parameters | None) -> scripts.Site:
    ranks = _number(ours, "ranks_per_node")
    nodes, time = _number(ours, "nodes"), ours.get("time")
    if (nodes is None or time is None) and kind in ("one_node", "many_nodes", "chain") and parameters is not None:
        found = _suggest(ours, parameters, ranks, nodes)
        nodes, time = found.nodes, time or found.time
    stage = ours.get("stage")
    if stage not in (None, "local"):
        raise SubmitError(f"stage={stage}: choose local")
    launcher = ours.get("launcher", "srun")
    if launcher not in ("srun", "mpirun"):
        raise SubmitError(f"launcher={launcher}: choose srun or mpirun")
    return scripts.Site(
        nodes=nodes or 1,
        ranks_per_node=ranks,
        time=time or "01:00:00",
        partition=ours.get("partition"),
        account=ours.get("account"),
        qos=ours.get("qos"),
        constraint=ours.get("constraint"),
        modules=tuple(m for m in ours.get("modules", "").split(",") if m),
        setup=ours.get("setup"),
        launcher=launcher,
        mpi=ours.get("mpi"),
        stage=stage,
        name=ours.get("name", "ssx_mpi"),
        tasks=len(_lines(ours["runs"])) if kind == "array" else 1,
    )


def _lines(name: str) -> list[str]:
    try:
        return [line for line in Path(name).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise SubmitError(f"runs={name}: {error.strerror}") from None


def _number(ours: dict[str, str], name: str) -> int | None:
    value = ours.get(name)
    if value is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise SubmitError(f"{name}={value}: must be a number above 0")
    return int(value)


def _suggest(ours: dict[str, str], parameters: Parameters, ranks: int | None, nodes: int | None) -> estimate.Estimate:
    from ssx_mpi.images.sources import find_images

    n_images = len(find_images(parameters.sources))
    cost, origin = _cost(ours, parameters)
    cores = ranks or _cores_of_a_node(ours.get("partition"))
    found = estimate.suggest(n_images, cost, cores, nodes)
    print(
        f"{n_images} images at {cost:.2g} CPU-seconds each ({origin}), {cores} ranks on each node: "
        f"{found.nodes} nodes for {found.time}",
        file=sys.stderr,
    )
    return found


def _cost(ours: dict[str, str], parameters: Parameters) -> tuple[float, str]:
    given = ours.get("cost")
    if given is not None:
        try:
            cost = float(given)
            if not 0 < cost < math.inf:
                raise SubmitError(f"cost={given}: must be a number above 0")
            return cost, "given"
        except ValueError:
            measured = estimate.measured_cost(Path(given))
            if measured is None:
                raise SubmitError(f"cost={given}: neither a number nor the ssx_mpi.json of a run") from None
            return measured, f"measured in {given}"
    measured = estimate.measured_cost(parameters.directory / "ssx_mpi.json")
    return (measured, "measured in this folder") if measured else (estimate.TYPICAL_COST, "a guess: give cost=")


def _cores_of_a_node(partition: str | None) -> int:
    """The fewest cores that a node of `partition` has, as Slurm says; 64 where it says nothing."""
    if shutil.which("sinfo") is None:
        return 64
    command = ["sinfo", "--noheader", "--format=%c", *([f"--partition={partition}"] if partition else [])]
    words = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return min((int(w.rstrip("+")) for w in words if w.rstrip("+").isdigit()), default=64)


def _submit(job: Job, after: str | None) -> str:
    """Hand `job` to Slurm, to begin when job number `after` has ended well; returns its own number."""
    if shutil.which("sbatch") is None:
        raise SubmitError("there is no sbatch here; --dry-run shows the script")
    command = ["sbatch", "--parsable"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run(command, input=job.script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubmitError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    number = done.stdout.strip().partition(";")[0]
    print(f"Submitted {job.kind} as job {number}")
    print(f"  state:   squeue --job={number}")
    print(f"  output:  tail -f {shlex.quote(_output(job, number))}")
    print(f"  to stop in order: scancel --signal=USR2 {number}")
    return number


def _output(job: Job, number: str) -> str:
    name = next(line.partition("=")[2] for line in job.script.splitlines() if line.startswith("#SBATCH --job-name="))
    return f"{name}_{number}_1.log" if job.kind == "array" else f"{name}_{number}.log"


if __name__ == "__main__":
    run()
