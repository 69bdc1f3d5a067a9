"""tools/slurm_train.py: which command each node runs. Slurm itself is not used."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

submitit = pytest.importorskip("submitit")

from tools import slurm_train  # noqa: E402


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Stands in for train_net.py; returns what it was called with."""
    script = tmp_path / "train_net.py"
    output = tmp_path / "commands.jsonl"
    script.write_text(
        f"import json, sys; open({str(output)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    )
    monkeypatch.setattr(slurm_train, "TRAIN_NET", script)
    return lambda: [json.loads(line) for line in output.read_text().splitlines()]


def test_one_node_runs_train_net(tmp_path, commands):
    arguments = ["--cluster", "debug", "--num-gpus", "2", "--log-folder", str(tmp_path / "logs")]
    job = slurm_train.submit([*arguments, "--config-file", "a.yaml", "SOLVER.MAX_ITER", "3"])
    job.result()
    assert commands() == [
        ["--num-gpus", "2", "--dist-url", "auto", "--config-file", "a.yaml", "SOLVER.MAX_ITER", "3"]
    ]


def test_a_config_file_after_an_equals_sign(tmp_path, commands):
    arguments = ["--cluster", "debug", "--log-folder", str(tmp_path / "logs")]
    slurm_train.submit([*arguments, "--config-file=a.yaml"]).result()
    assert commands()[0][-1] == "--config-file=a.yaml"


def test_each_node_finds_the_first(commands, monkeypatch):
    for node in (0, 1):
        environment = SimpleNamespace(hostnames=["gpu7", "gpu9"], node=node)
        monkeypatch.setattr(submitit, "JobEnvironment", lambda found=environment: found)
        slurm_train.Training(["--config-file", "a.yaml"], nodes=2, num_gpus=8, port=29517)()
    for node, command in enumerate(commands()):
        assert (
            command
            == (
                f"--num-gpus 8 --num-machines 2 --machine-rank {node} --dist-url tcp://gpu7:29517 "
                "--config-file a.yaml"
            ).split()
        )


def test_a_job_that_was_stopped_resumes(commands):
    training = slurm_train.Training(["--config-file", "a.yaml"], nodes=1, num_gpus=1, port=1)
    again = training.checkpoint().function
    assert again.arguments == ["--resume", "--config-file", "a.yaml"]
    assert again.checkpoint().function == again


def test_a_failed_training_fails_its_job(tmp_path, commands):
    (tmp_path / "train_net.py").write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        slurm_train.Training(["--config-file", "a.yaml"], nodes=1, num_gpus=1, port=1)()


def test_mistakes_give_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--config-file is missing"):
        slurm_train.submit(["--cluster", "debug"])
    with pytest.raises(SystemExit, match="has one node; --nodes is 2"):
        slurm_train.submit(["--cluster", "local", "--nodes", "2", "--config-file", "a.yaml"])
