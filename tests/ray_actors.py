"""Local actors of Ray Data that name regions, one of which is killed in its work."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from integrations.ray_data import NameRegions

from .tools import ROOT

SETTINGS: dict[str, Any] = {"model": "mini", "vocabulary": ["cat", "dog", "cup"], "zoom": 0}


class KilledOnce(NameRegions):
    """Notes its process in a folder; the first to come to its third batch is killed there."""

    def __init__(self, notes: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.notes, self.batches = Path(notes), 0
        self.notes.joinpath(f"actor-{os.getpid()}").touch()

    def __call__(self, batch: Any) -> pa.Table:
        self.batches += 1
        table = super().__call__(batch)
        if self.batches == 3:
            try:
                self.notes.joinpath("killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return table


def named_by_one(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names the regions of all images in this process."""
    names = NameRegions(**SETTINGS)
    found = []
    for row in rows:
        found += names({key: [value] for key, value in row.items()}).to_pylist()
    return in_order(found)


def named_by_actors(
    rows: list[dict[str, Any]], output: Path, notes: Path
) -> tuple[list[dict[str, Any]], bool, int]:
    """Names them in two actors that share a GPU of which Ray only believes that it is there.

    Returns:
        The rows of the Parquet files, whether an actor was killed, and how many there were.
    """
    import ray

    notes.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    try:
        named = ray.data.from_items(rows, override_num_blocks=25).map_batches(
            KilledOnce,
            fn_constructor_kwargs={"notes": str(notes), "device": "cpu", **SETTINGS},
            batch_size=8,
            num_gpus=0.5,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        named.write_parquet(str(output))
    finally:
        ray.shutdown()
    found = in_order(pyarrow.parquet.read_table(output).to_pylist())
    killed = notes.joinpath("killed").exists()
    return found, killed, len(list(notes.glob("actor-*")))


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["path"], row["region"] or 0))
