"""Columns of answers in a local Spark, and what becomes of them when processes die, hang or cannot start.

Run: pytest tests/test_spark.py
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlflow
import psutil
import pyarrow
import pytest
from stores import server

from phi3_mlflow.builders import onnx
from phi3_mlflow.runtime.errors import FormatError, InvalidRequest
from phi3_mlflow.spark import column, node, udf, worker

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds; only what is broken takes as long
CAPITALS = {"Spain": "Madrid", "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Greece": "Athens"}
QUESTIONS = [f"What is the capital of {country}?" for country in CAPITALS]
ANSWERS = [f"The capital of {country} is {city}." for country, city in CAPITALS.items()]
# The embedded model's end tokens, which an answer is kept from.
LONG = {
    "logit_bias": {"2048": -100, "2049": -100, "2055": -100},
    "repetition_guard": False,
    "self_talk_guard": False,
    "max_tokens": 400,
}
MESSAGES = "messages array<struct<role: string, content: string>>"
# What a driver runs on a cluster of this machine alone, whose executors are processes of their own.
DRIVER = """
import json, sys
from pyspark.sql import SparkSession
from phi3_mlflow.spark import udf
model, params, linger, rows = json.loads(sys.argv[1])
builder = SparkSession.builder.master("local-cluster[2,1,1024]").config("spark.ui.enabled", "false")
builder = builder.config("spark.scheduler.minRegisteredResourcesRatio", "1")  # a task for each executor
frame = builder.getOrCreate().createDataFrame(list(enumerate(rows)), "id int, q string")  # a part for each
answer = udf(model, task="flat", params=params, model_config={"parallel": 4}, linger=linger)
print(json.dumps(frame.select("id", answer("q")).collect()))
"""
# No two tests share a process: what is asked of it differs by so many seconds.
LINGER = itertools.count(30)


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory):
    """Where this module's processes are, none of which stays."""
    folder, before = tmp_path_factory.mktemp("node"), (os.environ.get("TMPDIR"), tempfile.tempdir)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)  # Spark's Python workers read the one, and this process
    yield folder
    for process in models(folder):
        process.kill()
    os.environ.pop("TMPDIR") if before[0] is None else os.environ.update({"TMPDIR": before[0]})
    tempfile.tempdir = before[1]


@pytest.fixture(scope="module")
def spark(room):
    """A session with two cores, which gives each task to a worker up to four times."""
    from pyspark.sql import SparkSession

    variables = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    session = SparkSession.builder.master("local[2,4]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def models(folder: Path) -> list[psutil.Process]:
    """The processes with a model whose files are below a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command, place = process.info["cmdline"] or [], process.info["cwd"] or "/"
        if "phi3_mlflow.spark.process" in command and Path(place).is_relative_to(folder):
            found.append(process)
    return found


def workers(spark) -> list[psutil.Process]:
    """The Python workers, which Spark's daemon forks."""
    java = psutil.Process(spark.sparkContext._gateway.proc.pid)
    python = [each for each in psutil.process_iter(["cmdline"]) if "pyspark.daemon" in (each.info["cmdline"] or [])]
    return [each for each in python if each.parent() in python and java in each.parents()]


def until(condition, patience=PATIENCE):
    """What a condition comes to, when it comes to something."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def plan(model, task="flat", params=None, config=None, **changes):
    """A process of its own, and what it is to be asked."""
    spec, task, options = column.plan(str(model), task, params or {}, config or {}, next(LINGER))
    return replace(spec, **changes), task, options


def ask(plan, rows, start=PATIENCE, stall=PATIENCE):
    """The answers that a task of one batch gets."""
    [answers] = worker.evaluate(iter([pyarrow.array(rows)]), *plan, worker.Patience(start, stall))
    return answers.to_pylist()


def running(spec) -> list[psutil.Process]:
    return models(spec.folder)


def answering(spec) -> psutil.Process:
    """The process with the model, when it has begun with a table."""
    log = spec.folder / "log"
    until(lambda: log.exists() and b"a table has come" in log.read_bytes() and running(spec))
    return running(spec)[0]


def test_texts_become_texts_and_null_and_bad_rows_become_null(spark, onnx_model):
    rows = [*QUESTIONS, None, ""]
    frame = spark.createDataFrame([(row,) for row in rows], "text string")
    answer = udf(str(onnx_model), task="flat")

    answered = frame.withColumn("answer", answer("text"))
    spark.udf.register("answer", answer)
    frame.createOrReplaceTempView("questions")

    assert answered.dtypes == [("text", "string"), ("answer", "string")]
    assert [tuple(row) for row in answered.collect()] == list(zip(rows, [*ANSWERS, None, None], strict=True))
    [[sql]] = spark.sql("SELECT answer(text) FROM questions WHERE text = 'What is the capital of Spain?'").collect()
    assert sql == ANSWERS[0]


def test_chats_get_typed_answers_or_what_is_wrong_with_them_and_are_asked_once(spark, onnx_model):
    chats = [
        ([{"role": "user", "content": QUESTIONS[0]}],),
        ([{"role": "robot", "content": "Beep."}],),
        (None,),
        ([],),
        ([{"role": "user", "content": None}],),
        ([{"role": "user", "content": QUESTIONS[1]}, {"role": "assistant", "content": ANSWERS[1]}] * 2000,),
    ]
    frame = spark.createDataFrame(chats, MESSAGES).coalesce(1)
    config = {"parallel": 4, "queue_limit": 1}
    spec, *_ = column.plan(str(onnx_model), None, {"max_tokens": 4}, config, linger := next(LINGER))
    answer = udf(str(onnx_model), params={"max_tokens": 4}, model_config=config, linger=linger)

    answered = frame.withColumn("answer", answer("messages"))
    rows = answered.select("answer", "answer.content", "answer.error").where("answer.content IS NULL OR true").collect()

    assert answered.schema["answer"].dataType.simpleString() == (
        "struct<content:string,finish_reason:string,prompt_tokens:bigint,completion_tokens:bigint,error:string>"
    )
    found = [row.answer and tuple(row.answer) for row in rows]
    assert found[0] == ("The capital of Spain", "length", 14, 4, None)
    assert found[2] is None
    assert [row and row[:4] for row in found[1:2] + found[3:]] == [(None,) * 4] * 4
    for row, words in zip(found[1:2] + found[3:], ("[0].role", "`messages`", "[0].content", "tokens"), strict=True):
        assert words in row[4]
    assert [row.error for row in rows] == [row and row[4] for row in found]
    until(lambda: "a task has ended" in node.log_end(spec))
    assert re.findall(r"rows answered: (\d+)", node.log_end(spec)) == ["5"]


def test_a_node_has_one_process_with_the_model_and_no_worker_has_it(spark, onnx_model, room):
    before = models(room)
    frame = spark.range(40).selectExpr("'What is the capital of Spain?' AS text").repartition(4)
    answer = udf(str(onnx_model), task="flat", params={**LONG, "max_tokens": 30}, linger=next(LINGER))

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(frame.select(answer("text")).collect)
        [process] = until(lambda: [each for each in models(room) if each not in before])
        until(lambda: len(connected(process)) == 3)  # the socket itself, and two tasks at the same time
        libraries = [loaded(each) for each in workers(spark)]
        assert [each for each in models(room) if each not in before] == [process]
        assert len(job.result(PATIENCE)) == 40

    assert len(libraries) >= 2  # Spark keeps some for later
    assert not any("onnxruntime" in each or "mlflow" in each for each in libraries)
    assert "onnxruntime" in loaded(process)


def loaded(process: psutil.Process) -> str:
    """The files that a process has mapped."""
    return " ".join(each.path for each in process.memory_maps())


def connected(process: psutil.Process) -> list:
    return process.net_connections(kind="unix")


@pytest.mark.parametrize("victim", ["the model", "a worker"])
def test_every_row_is_answered_once_when_a_process_is_killed(spark, onnx_model, victim):
    linger = next(LINGER)
    spec, *_ = column.plan(str(onnx_model), "flat", LONG, {"parallel": 4}, linger)
    frame = spark.createDataFrame(
        [(number, question) for number, question in enumerate(QUESTIONS * 4)], "id int, q string"
    )
    answer = udf(str(onnx_model), task="flat", params=LONG, model_config={"parallel": 4}, linger=linger)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(frame.repartition(2).select("id", answer("q").alias("answer")).collect)
        process = answering(spec)
        (process if victim == "the model" else workers(spark)[0]).kill()
        rows = job.result(PATIENCE)

    assert sorted(row.id for row in rows) == list(range(20))
    assert all(len(row.answer) > 400 for row in rows)
    assert (running(spec) == [process]) == (victim == "a worker")


def test_every_row_is_answered_once_when_an_executor_is_killed(onnx_model, tmp_path):
    import pyspark

    home = tmp_path / "home"  # which Spark's own workers write into
    home.mkdir()
    for name in ("bin", "jars"):
        (home / name).symlink_to(Path(pyspark.__file__).parent / name)
    variables = {"SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    variables = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    linger = next(LINGER)
    spec, *_ = column.plan(str(onnx_model), "flat", LONG, {"parallel": 4}, linger)
    command = [sys.executable, "-c", DRIVER, json.dumps([str(onnx_model), LONG, linger, QUESTIONS * 4])]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        try:
            until(lambda: running(spec), 4 * PATIENCE)  # three of Java's machines start, with Python in two of them
            process = answering(spec)
            until(lambda: len(connected(process)) == 3)  # the socket itself, and a task of each executor
            java = [each for each in psutil.process_iter(["cmdline"]) if f"{home}/" in str(each.info["cmdline"])]
            executors = [each for each in java if "CoarseGrainedExecutorBackend" in str(each.info["cmdline"])]
            executors[0].kill()
            rows = json.loads(driver.communicate(timeout=4 * PATIENCE)[0])
        finally:
            driver.kill()

    assert len(executors) == 2
    assert sorted(number for number, _ in rows) == list(range(20))
    assert all(len(answer) > 400 for _, answer in rows)
    assert (spec.folder / "log").read_text("utf-8").count("a table has come") == 3  # one task was given twice
    assert running(spec) == [process]


def test_a_process_that_hangs_is_ended_and_its_rows_are_asked_again(onnx_model):
    asked = plan(onnx_model, params=LONG)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, asked, QUESTIONS, stall=5)
        process = answering(asked[0])
        process.suspend()
        answers = job.result(PATIENCE)

    assert all(len(answer) > 400 for answer in answers)
    assert running(asked[0]) != [process]


def test_a_task_fails_when_the_process_dies_a_second_time(onnx_model):
    asked = plan(onnx_model, params={**LONG, "max_tokens": 3000})

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, asked, QUESTIONS)
        first = answering(asked[0])
        first.kill()
        first.wait(PATIENCE)
        until(lambda: running(asked[0]))
        answering(asked[0]).kill()
        with pytest.raises(node.ModelProcessError, match="died while it answered, for the second time in this task"):
            job.result(PATIENCE)


def test_a_process_that_stands_still_while_it_starts_is_not_waited_for_for_ever(onnx_model):
    asked = plan(onnx_model)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, asked, QUESTIONS, start=3)
        [process] = until(lambda: running(asked[0]))
        process.suspend()
        with pytest.raises(node.ModelProcessError, match="was not ready after 3 s"):
            job.result(PATIENCE)

    assert not running(asked[0])


def test_a_worker_that_leaves_while_it_is_answered_holds_nobody_up(onnx_model):
    asked = plan(onnx_model, params={**LONG, "max_tokens": 3000})
    connection, _ = node.connect(asked[0], PATIENCE, PATIENCE)
    connection.sendall(b'{"task": "flat", "options": {"max_tokens": 3000}, "rows": ["Count.", "Count."]}\n')
    answering(asked[0])
    connection.close()

    assert ask((*asked[:2], {}), QUESTIONS) == ANSWERS


def test_a_process_ends_when_nobody_has_been_connected_for_a_while(onnx_model):
    asked = plan(onnx_model, linger=1.0)
    assert ask(asked, QUESTIONS) == ANSWERS
    [process] = running(asked[0])

    process.wait(PATIENCE)

    assert ask(asked, QUESTIONS[:1]) == ANSWERS[:1]  # by a new one


def test_workers_that_come_at_the_same_time_share_the_process(onnx_model):
    asked = plan(onnx_model)
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(lambda _: ask(asked, QUESTIONS), range(4)))

    assert tables == [ANSWERS] * 4
    assert len(running(asked[0])) == 1


def test_a_model_that_is_not_on_the_node_is_named(onnx_model, tmp_path):
    asked = plan(onnx_model, source=str(tmp_path / "elsewhere"))
    with pytest.raises(node.ModelProcessError, match=f"{tmp_path / 'elsewhere'} on the driver, and .* no such folder"):
        ask(asked, QUESTIONS)

    asked = plan(onnx_model, digest="0")
    with pytest.raises(node.ModelProcessError, match="is another one than on the driver"):
        ask(asked, QUESTIONS)


def test_the_processes_folder_must_be_private(onnx_model, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"phi3-mlflow-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(node.ModelProcessError, match="that only its owner may enter"):
        ask(plan(onnx_model), QUESTIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"params": {"max_tokens": 0}}, "`max_tokens` is 0"),
        ({"params": {"seeds": 7}}, "`seeds` is not a field"),
        ({"params": {"temperature": "hot"}}, "`temperature` is 'hot'"),
        ({"params": {"n": 2}}, "`n` is 2, and a row has one answer"),
        ({"params": {"logprobs": True}}, "`logprobs` is True"),
        ({"params": {"show_engine": True}}, "`show_engine` is True"),
        ({"params": {"tools": [{}]}}, "`tools` is [{}], and a row has one answer"),
        ({"params": {"max_time": 3}}, "`max_time` is 3, and rows wait"),
        ({"params": {"messages": []}}, "`messages` is no option"),
        ({"params": {"response_format": {"type": "regex", "regex": "("}}}, "`response_format.regex`"),
        ({"task": "flat", "params": {"response_format": '{"type": "yaml"}'}}, "`response_format.type` is 'yaml'"),
        ({"task": "chat"}, "`task` is 'chat'; it must be one of"),
        ({"model_config": {"paralel": 4}}, "`paralel` is not a setting"),
        ({"model_config": {"parallel": 65}}, "`parallel` is 65"),
        ({"model_config": {"kv_budget": "1GiB"}}, "`kv_budget` is given, and it needs `parallel`"),
        ({"linger": 0}, "`linger` is 0"),
    ],
)
def test_what_no_row_could_be_answered_with_is_refused_on_the_driver(onnx_model, arguments, words):
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        udf(str(onnx_model), **arguments)


def test_only_models_of_ours_are_taken(tmp_path):
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    with pytest.raises(FormatError, match="was not logged by phi3_mlflow"):
        udf(str(tmp_path))


def test_the_documents_code_runs_as_it_stands_there(spark, capsys):
    onnx.log_model(name="phi3", registered_model_name="phi3", alias="champion")
    code = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "spark.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    exec("\n".join(code), {})

    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in tables] == [
        ["text", "answer"],
        [QUESTIONS[0], ANSWERS[0]],
        ["", "NULL"],
        ["NULL", "NULL"],
        ["answer"],
        [ANSWERS[0]],
        ["content", "finish_reason", "prompt_tokens", "completion_tokens", "error"],
        [ANSWERS[1], "stop", "14", "8", "NULL"],
        ["NULL"] * 4 + ["`messages[0].role` is 'robot'; it must be one of system, user, assistant"],
    ]


def test_a_node_downloads_a_model_once(tmp_path, room, tracking, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with server(tmp_path, f"sqlite:///{tmp_path / 'server.db'}") as (address, _):
        try:
            mlflow.set_tracking_uri(address)
            mlflow.set_experiment("Default")
            onnx.log_model(name="phi3", registered_model_name="far", alias="champion")
            asked = plan("models:/far@champion")
        finally:
            mlflow.set_tracking_uri(tracking)
            mlflow.set_experiment("tests")
        assert ask(asked, QUESTIONS) == ANSWERS

    [folder] = (room / f"phi3-mlflow-{os.getuid()}" / "models").iterdir()
    assert (folder / "MLmodel").is_file()
    assert ask((replace(asked[0], linger=next(LINGER)), *asked[1:]), QUESTIONS) == ANSWERS  # and the server has gone
