"""What is made beside its destination: by one run at a time, and by the next one when that was killed.

Run with: python -m pytest tests/test_room.py
"""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import mlflow
import psutil
import pytest

from phi3_mlflow import tracking
from phi3_mlflow.quantize import process
from phi3_mlflow.room import room
from phi3_mlflow.runtime.errors import Phi3Error, WeightsError

PATIENCE = 60

STAYS = """
import sys, time
from pathlib import Path
from phi3_mlflow.room import room
with room(Path(sys.argv[1])) as place:
    (place / "half").mkdir()
    (place / "half" / "file").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_one_run_at_a_time_makes_a_destination(tmp_path):
    with room(tmp_path / "a" / "made") as place:
        assert list(place.iterdir()) == []
        with pytest.raises(Phi3Error, match="another run is making"), room(tmp_path / "a" / "made"):
            pass
        with room(tmp_path / "a" / "other") as other:
            assert other != place
        waited = []

        def wait():
            with room(tmp_path / "a" / "made", wait=True) as later:
                waited.append(later.is_dir())

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        assert waited == []
    thread.join(PATIENCE)
    assert waited == [True]
    assert list((tmp_path / "a").iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", STAYS, str(tmp_path / "made")], stdout=subprocess.PIPE)
    assert killed.stdout.readline() == b"ready\n"
    killed.kill()
    killed.wait(PATIENCE)
    killed.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".made.making"]
    with room(tmp_path / "made") as place:
        assert list(place.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


STEP = "from phi3_mlflow.quantize.process import follow; import os, time; follow(); print(os.getpid(), flush=True); "
STARTS = """
import sys
from phi3_mlflow.quantize.process import run
run([sys.executable, "-c", sys.argv[1]], "a step", lambda line: print(line, flush=True))
"""
BUSY = {"Python": "time.sleep(600)", "native code with Python's lock": "import ctypes; ctypes.PyDLL(None).sleep(600)"}


@pytest.mark.parametrize("busy", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_step_ends_with_the_process_that_started_it(number, busy):
    starter = subprocess.Popen([sys.executable, "-c", STARTS, STEP + busy], stdout=subprocess.PIPE)
    step = psutil.Process(int(starter.stdout.readline()))
    starter.send_signal(number)
    starter.wait(PATIENCE)
    starter.stdout.close()
    step.wait(PATIENCE)
    assert not psutil.pid_exists(step.pid)


def test_the_model_builder_ends_before_it_is_imported_where_nobody_waits_for_it(tmp_path):
    (tmp_path / "onnx.py").write_text("import time; time.sleep(600)")
    builder = [sys.executable, "-m", "phi3_mlflow.quantize.pieces"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run(builder, stdin=subprocess.DEVNULL, env=environment, timeout=PATIENCE, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_a_step_that_ends_by_itself_is_not_taken_for_killed():
    ends = STEP + "print('done', flush=True); os.close(1); os.close(2); time.sleep(1)"
    lines = []
    process.run([sys.executable, "-c", ends], "a step", lines.append)
    assert lines[-1] == "done"
    with pytest.raises(WeightsError, match="exit code 3: why"):
        process.run([sys.executable, "-c", STEP + "print('why'); raise SystemExit(3)"], "x")
    with pytest.raises(WeightsError, match="was killed"):
        process.run([sys.executable, "-c", STEP + "os.kill(os.getpid(), 9)"], "x")


def test_a_local_stores_database_is_whole_or_not_there(tmp_path):
    script = f"""
import os
from pathlib import Path
import mlflow
from phi3_mlflow import tracking
find = mlflow.MlflowClient.search_experiments
def killed(*arguments, **named):
    find(*arguments, **named)
    os.kill(os.getpid(), 9)
mlflow.MlflowClient.search_experiments = killed
tracking.create_database(Path({str(tmp_path / "mlflow.db")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "mlflow.db").exists()

    tracking.create_database(tmp_path / "mlflow.db")
    tracking.create_database(tmp_path / "mlflow.db")  # there already
    assert os.listdir(tmp_path) == ["mlflow.db"]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM experiments").fetchone() == (1,)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [each.name for each in client.search_experiments()] == ["Default"]
