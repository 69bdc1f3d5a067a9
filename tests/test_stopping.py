"""Programs that are stopped, killed in part, or cannot write: one line, and nothing is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import portalocker
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app import main as app
from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.journal import Journal, JournalError, JournalFullError
from regionspot_d2.stopping import leave_interrupts, stoppable

from .tiny import tiny_model
from .tools import load_script


def send(number: int, process: int | None = None) -> None:
    os.kill(os.getpid() if process is None else process, number)
    time.sleep(0.01)  # Python calls its handlers between two instructions


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_counts_once(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            send(number)
        finally:
            send(number)
            written = True
    assert written and signal.getsignal(number) is before


def test_what_ignores_ctrl_c_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_says_what_is_done_and_ends_the_processes(capsys):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    with pytest.raises(SystemExit) as stop, told_in_a_line("tool.py", lambda: "3 of 4 are done."):
        child.start()
        send(signal.SIGINT, child.pid)
        send(signal.SIGTERM)
    child.join(10)
    assert stop.value.code == 130 and child.exitcode == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "tool.py: stopped. 3 of 4 are done.\n"


class _Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> tuple[int, int]:
        return number, os.getpid()


def test_the_workers_of_a_loader_leave_ctrl_c_to_the_main_process():
    loader = DataLoader(_Numbers(), num_workers=1, batch_size=None, worker_init_fn=leave_interrupts)
    batches = iter(loader)
    number, worker = next(batches)
    send(signal.SIGINT, worker)
    assert [number, *(number for number, _ in batches)] == [*range(6)]


class _Tensors(_Numbers):
    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.ones(2)


def test_a_worker_does_not_tell_that_the_main_process_hung_up(monkeypatch, capfd):
    def stopped(connection: Connection, key: bytes) -> None:
        connection.close()
        raise KeyboardInterrupt

    loader = DataLoader(_Tensors(), num_workers=1, batch_size=None, worker_init_fn=leave_interrupts)
    batches = iter(loader)
    monkeypatch.setattr(multiprocessing.connection, "answer_challenge", stopped)
    for _ in range(2):  # as many as the worker prepares
        with pytest.raises(KeyboardInterrupt):
            next(batches)
    del batches  # ends the worker
    assert capfd.readouterr().err == ""


def test_a_killed_worker_is_told_with_how_to_go_on():
    message = (
        r"^tool.py: RuntimeError: DataLoader worker .* killed .*NUM_WORKERS. Go on by --resume"
    )
    with pytest.raises(SystemExit, match=message):
        with told_in_a_line("tool.py", lambda: "Go on by --resume."):
            for _, worker in DataLoader(_Numbers(), num_workers=1, batch_size=None):
                send(signal.SIGKILL, worker)
                time.sleep(0.2)


def test_one_run_at_a_time_writes_a_journal(tmp_path):
    path = tmp_path / "log.jsonl"
    Journal(path, {"a": 1}, resume=False).add("b", 2)
    before = path.read_bytes()
    with path.open("ab") as other:
        portalocker.lock(other, portalocker.LOCK_EX)  # of another process
        for resume in (True, False):
            with pytest.raises(JournalError, match="log.jsonl is in use: another run"):
                Journal(path, {"a": 1}, resume=resume)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    first = Journal(path, {"a": 1}, resume=True)
    # The same process may open it again.
    assert Journal(path, {"a": 1}, resume=True).entries == first.entries == {"b": 2}


def test_a_journal_on_a_full_disk_stays_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    journal = Journal(path, {}, resume=False)
    journal.add("a", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(JournalFullError, match="log.jsonl cannot be written"):
            journal.add("b", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.entries == {"a": 1}
    journal.add("c", 3)
    assert Journal(path, {}, resume=True).entries == {"a": 1, "c": 3}


@pytest.mark.usefixtures("vocabularies")
@pytest.mark.parametrize("fault", ["SIGTERM", "full disk"])
def test_a_demo_that_must_stop_goes_on_with_resume(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(
        app,
        "RegionSpotPredictor",
        lambda cfg, vocabulary: RegionSpotPredictor(tiny_model(), vocabulary=vocabulary),
    )
    for name in "abc":
        Image.new("RGB", (48, 32)).save(tmp_path / f"{name}.png")
    inputs = [str(tmp_path / f"{name}.png") for name in "abc"]
    arguments = ["--input", *inputs, "--output", str(tmp_path / "out"), "--boxes", "2,2,20,20"]
    arguments += ["--vocabulary", "cat,dog"]
    add = Journal.add

    def failing(self, key, entry):
        if len(self.entries) == 1:
            if fault == "SIGTERM":
                send(signal.SIGTERM)
            raise JournalFullError(errno.ENOSPC, "No space left on device")
        add(self, key, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", failing)
        assert app.main(arguments) == (130 if fault == "SIGTERM" else 1)
    said = capsys.readouterr()
    assert "Stopped after 1 of 3 images; their results are written." in said.err
    assert "--resume goes on" in said.err and "Traceback" not in said.err
    assert "1 named, 0 without regions, 0 failed." in said.out
    results = tmp_path / "out" / "results.json"
    assert len(json.loads(results.read_text())["images"]) == 1
    assert app.main([*arguments, "--resume"]) == 0
    assert len(json.loads(results.read_text())["images"]) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{name}.png.png" for name in "abc"),
        *("results.json", "results.jsonl"),
    ]


def test_a_training_that_wrote_nothing_does_not_claim_an_earlier_checkpoint(
    tmp_path, monkeypatch, capsys
):
    train_net = load_script("train_net.py")

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_net, "launch", stop)
    monkeypatch.setattr(train_net, "load_config", lambda *arguments, **options: cfg)
    cfg = type("Config", (), {"OUTPUT_DIR": str(tmp_path)})
    marker = tmp_path / "last_checkpoint"
    marker.write_text("model_0000001.pth")
    os.utime(marker, (1, 1))
    for options, said in [
        ([], "This run wrote no checkpoint yet; --resume would go on from an earlier run's"),
        (["--resume"], "The last checkpoint is"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train_net.py", *options])
        with pytest.raises(SystemExit) as error:
            train_net.invoke_main()
        assert error.value.code == 130 and said in capsys.readouterr().err


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_last_checkpoint_that_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "last_checkpoint")
    with pytest.raises(ValueError, match="last_checkpoint' is not a regular file"):
        RegionSpotCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).resume_or_load("")


def test_checkpoints_that_killed_processes_left_unfinished_go(tmp_path: Path) -> None:
    leftover = tmp_path / ".model_0000001.pth.abcd.partial"
    leftover.write_bytes(b"half")
    RegionSpotCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
