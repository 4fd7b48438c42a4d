"""What a user sees while batches finish, and what programs read afterwards."""

from __future__ import annotations

import json
import logging

import pytest
from test_text import statistics

from ssx_mpi.report.progress import Progress
from ssx_mpi.report.run_report import LiveReport

DISPATCH = {"messages_per_image": 2.0, "bytes_per_image": 10.0, "coordinator_busy": 0.01, "waiting": 0.1}


@pytest.fixture
def live(tmp_path):
    return LiveReport(tmp_path, 20, 3, True, {"n_batches": 2, "program": "ssx_mpi x"})


def written(folder) -> dict:
    return json.loads((folder / "ssx_mpi.json").read_text())


def test_the_json_has_the_same_numbers_after_each_batch(live, tmp_path):
    live.start(0)
    live.show(10)
    live.hear(2, statistics(10, 4), [("x_3.cbf", "read", "truncated")])
    content = written(tmp_path)
    assert (content["state"], content["ranks"], content["n_images"]) == ("running", 3, 20)
    assert content["total"]["counts"]["hits"] == content["batches"]["2"]["counts"]["hits"] == 4
    assert content["left_out"] == [["x_3.cbf", "read", "truncated"]]
    live.show(20)
    live.hear(1, statistics(10, 2), [])
    live.conclude("done", 12.5, DISPATCH)
    content = written(tmp_path)
    assert (content["state"], content["seconds"], content["dispatch"]) == ("done", 12.5, DISPATCH)
    assert list(content["batches"]) == ["1", "2"]
    assert content["total"]["counts"]["hits"] == 6


def test_batches_that_were_finished_before_count(live, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ssx_mpi")
    live.add_finished(1, statistics(10, 3), [])
    live.start(10)
    live.show(10)
    live.hear(2, statistics(10, 1), [])
    live.conclude("done", 1.0, DISPATCH)
    assert written(tmp_path)["total"]["counts"] | {"images": 20, "hits": 4} == written(tmp_path)["total"]["counts"]
    assert "10 of 20 images are finished already" in caplog.text
    assert "Batch 2 of 2" in caplog.text
    assert "about 0 s left" in caplog.text


def test_images_of_unfinished_batches_count_as_done(live, caplog):
    caplog.set_level(logging.INFO, "ssx_mpi")
    before = statistics(10, 3)
    before.failures["read: its data file is missing"] = 2
    live.add_finished(1, before, [])
    live.start(12)
    live.show(4)
    live.conclude("stopped", 2.0, DISPATCH)
    assert "2 of these could not be read, and are not tried again but with restart=True" in caplog.text
    assert "4 images in 2 s on 3 ranks, 2.00 images/s" in caplog.text
    assert "16 of 20 images are finished; numbers are those of finished batches" in caplog.text


@pytest.mark.parametrize("before", [20, 10])
def test_what_was_reduced_stays_unless_images_are_added(live, tmp_path, before):
    (tmp_path / "ssx_mpi.json").write_text('{"reduction": {"state": "done"}}')
    live.add_finished(1, statistics(before, 3), [])
    live.start(before)
    live.conclude("done", 1.0, DISPATCH)
    assert written(tmp_path).get("reduction") == ({"state": "done"} if before == 20 else None)


def test_what_is_ready_is_linked(live, tmp_path):
    (tmp_path / "batch_1").mkdir()
    (tmp_path / "batch_1" / "integrated_1.refl").write_text("ready")
    live.hear(1, statistics(1, 1), [])
    assert (tmp_path / "DataFiles" / "integrated_1.refl").read_text() == "ready"
    assert not (tmp_path / "DataFiles" / "integrated_1.expt").is_symlink()


def test_a_batch_job_gets_a_line_a_minute(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("ssx_mpi.report.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, "ssx_mpi")
    progress = Progress("images", 500, True)
    for second in range(0, 150, 10):
        now[0] = float(second)
        progress.show(second)
    progress.close()
    assert [r.getMessage() for r in caplog.records] == [
        "images: 60 of 500 images after 60 s",
        "images: 120 of 500 images after 2 min",
    ]


def test_other_ranks_say_nothing(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ssx_mpi")
    monkeypatch.setattr("ssx_mpi.report.progress._LINE_EVERY", 0.0)
    progress = Progress("images", 5, False)
    progress.show(3)
    progress.close()
    assert not caplog.records
