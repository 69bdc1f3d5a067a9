#!/usr/bin/env python
"""Submits train_net.py to Slurm (``pip install submitit``).

    python tools/slurm_train.py --nodes 2 --num-gpus 8 --partition gpu --hours 48 \\
        --config-file configs/train_o365_L.yaml SOLVER.IMS_PER_BATCH 32

Every node runs train_net.py once, which starts a process for each GPU. A job that is preempted or
reaches its time limit is requeued and resumes from its last checkpoint. Slurm's logs are in
``--log-folder``, those of the training in ``OUTPUT_DIR``. ``--cluster local`` runs on this machine
without Slurm, ``--cluster debug`` in this process; both take one node. Arguments that are not below
go to train_net.py.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--num-gpus", type=int, default=8, help="on each node")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, help="for the loader's workers")
    parser.add_argument("--hours", type=float, default=24.0, help="time limit")
    parser.add_argument("--partition")
    parser.add_argument("--port", type=int, default=29517, help="a free port on the first node")
    parser.add_argument("--log-folder", type=Path, default=Path("output/slurm"))
    parser.add_argument("--cluster", choices=["slurm", "local", "debug"], default="slurm")
    return parser


if __name__ == "__main__":
    begin(argument_parser(), others=True)

import submitit

from regionspot_d2.engine.config import told_in_a_line

TRAIN_NET = Path(__file__).resolve().parent.parent / "train_net.py"


@dataclass
class Training:
    """What a node runs; submitit pickles it.

    Attributes:
        arguments: the arguments of train_net.py.
        nodes: number of nodes.
        num_gpus: processes on each node.
        port: a free port on the first node.
    """

    arguments: list[str]
    nodes: int
    num_gpus: int
    port: int

    def __call__(self) -> None:
        command = [sys.executable, str(TRAIN_NET), "--num-gpus", str(self.num_gpus)]
        if self.nodes > 1:
            environment = submitit.JobEnvironment()
            master = environment.hostnames[0]
            command += ["--num-machines", str(self.nodes)]
            command += ["--machine-rank", str(environment.node)]
            command += ["--dist-url", f"tcp://{master}:{self.port}"]
        else:
            command += ["--dist-url", "auto"]
        subprocess.run(command + self.arguments, check=True)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What to run when Slurm ends the job early; submitit calls it."""
        arguments = self.arguments
        if "--resume" not in arguments:
            arguments = ["--resume", *arguments]
        return submitit.helpers.DelayedSubmission(
            Training(arguments, self.nodes, self.num_gpus, self.port)
        )


def submit(arguments: list[str]) -> submitit.Job[None]:
    """Submits a training run, from the arguments of this script and of train_net.py."""
    args, rest = argument_parser().parse_known_args(arguments)
    if args.nodes > 1 and args.cluster != "slurm":
        raise SystemExit(f"--cluster {args.cluster} has one node; --nodes is {args.nodes}.")
    # argparse takes "--config-file=x.yaml" as well.
    if "--config-file" not in (argument.partition("=")[0] for argument in rest):
        raise SystemExit("--config-file is missing.")
    executor = submitit.AutoExecutor(folder=args.log_folder, cluster=args.cluster)
    executor.update_parameters(
        name="regionspot",
        nodes=args.nodes,
        tasks_per_node=1,
        cpus_per_task=args.num_gpus * args.cpus_per_gpu,
        timeout_min=round(60 * args.hours),
    )
    if args.cluster == "slurm":
        executor.update_parameters(gpus_per_node=args.num_gpus, slurm_partition=args.partition)
    return executor.submit(Training(rest, args.nodes, args.num_gpus, args.port))


if __name__ == "__main__":
    with told_in_a_line("slurm_train.py"):
        job = submit(sys.argv[1:])
    print(f"Job {job.job_id}; its log: {job.paths.stdout}")
