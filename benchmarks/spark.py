"""Throughput and memory of a column of answers in Spark: 10,000 short questions as texts and as chats.

python benchmarks/spark.py [--rows 10000] [--parallel 8] [--workers 1 2]

The embedded model; MLflow's spark_udf besides: --spark-udf
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import mlflow
import psutil
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql.functions import array, col, concat, lit, struct

from phi3_mlflow import machine
from phi3_mlflow.builders import onnx
from phi3_mlflow.spark import udf

COUNTRIES = ("Spain", "France", "Italy", "Japan", "Germany", "Portugal", "Greece", "Norway")


class Memory(threading.Thread):
    """The most memory that Spark's Python workers and the process with the model held, in bytes.

    Memory that processes share counts in parts, so that the sum is what the machine gives (PSS).
    """

    def __init__(self, java: int):
        super().__init__(daemon=True)
        self.most = {"model": 0, "workers": 0}
        self.processes = 0
        self._java = psutil.Process(java)
        self._over = threading.Event()

    def run(self) -> None:
        """Looks once a second."""
        while not self._over.wait(1.0):
            held: Counter[str] = Counter()
            processes = 0
            for process in psutil.process_iter(["cmdline", "cwd"]):
                command = process.info["cmdline"] or []
                here = (process.info["cwd"] or "").startswith(os.environ["TMPDIR"])
                model = here and "phi3_mlflow.spark.process" in command
                try:
                    if model or ("pyspark.daemon" in command and self._java in process.parents()):
                        held["model" if model else "workers"] += process.memory_full_info().pss
                        processes += model
                except psutil.Error:
                    continue
            self.processes = max(self.processes, processes)
            self.most = {name: max(most, held[name]) for name, most in self.most.items()}

    def end(self) -> None:
        """Stops looking."""
        self._over.set()
        self.join()


def session(workers: int) -> SparkSession:
    """A local Spark with so many Python workers."""
    builder = SparkSession.builder.master(f"local[{workers},4]").config("spark.ui.enabled", "false")
    found = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "1000").getOrCreate()
    found.sparkContext.setLogLevel("ERROR")
    return found


def questions(spark: SparkSession, rows: int, workers: int) -> DataFrame:
    """Numbered questions, as a text and as a chat."""
    country = array(*map(lit, COUNTRIES))[(col("id") % len(COUNTRIES)).cast("int")]
    text = concat(lit("What is the capital of "), country, lit("?"))
    chat = array(struct(lit("user").alias("role"), col("text").alias("content")))
    return spark.range(rows).repartition(workers).withColumn("text", text).withColumn("messages", chat)


def measure(spark: SparkSession, frame: DataFrame, answer: Column, rows: int) -> tuple[float, Memory]:
    """Seconds for all answers, and the memory of that time. Every row has to be answered, and only once."""
    memory = Memory(spark.sparkContext._gateway.proc.pid)
    memory.start()
    start = time.perf_counter()
    found = frame.select("id", "text", answer.alias("answer")).collect()
    took = time.perf_counter() - start
    memory.end()
    if sorted(row.id for row in found) != list(range(rows)):
        sys.exit("some rows have no answer, or several")
    answers = [getattr(row.answer, "content", row.answer) for row in found]
    if not all(answers):
        sys.exit(f"{answers.count(None)} answers are missing")
    return took, memory


def main() -> None:
    """Measures what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="questions")
    parser.add_argument("--parallel", type=int, default=8, help="the model's setting")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="Python workers at once, one after another"
    )
    parser.add_argument("--spark-udf", action="store_true", help="MLflow's function too, as texts")
    asked = parser.parse_args()
    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    config = {"parallel": asked.parallel}
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = temporary  # so that no other job's processes are counted, or shared
        paths = {task: Path(temporary) / name for task, name in (("flat", "flat"), ("llm/v1/chat", "chat"))}
        for task, path in paths.items():
            onnx.save_model(path, task=task)
        for workers in asked.workers:
            spark = session(workers)
            frame = questions(spark, asked.rows, workers)
            ours = {
                task: udf(str(path), params={"max_tokens": 32}, model_config=config, linger=1 + workers / 10)
                for task, path in paths.items()
            }
            kinds = {"texts": ours["flat"]("text"), "chats": ours["llm/v1/chat"]("messages")}
            if asked.spark_udf:
                theirs = mlflow.pyfunc.spark_udf(
                    spark, str(paths["flat"]), "string", model_config=config, params={"max_tokens": 32}
                )
                kinds["texts, spark_udf"] = theirs(struct(col("text").alias("prompt")))
            for kind, answer in kinds.items():
                print(f"workers: {workers}, {kind} ...", file=sys.stderr)
                took, memory = measure(spark, frame, answer, asked.rows)
                model, held = (memory.most[name] / 2**20 for name in ("model", "workers"))
                lines.append(
                    f"| {kind} | {workers} | {took:.0f} s | {asked.rows / took:.1f} | {memory.processes} "
                    f"| {model:.0f} MiB | {held:.0f} MiB |"
                )
                time.sleep(5)  # until the process has ended
            spark.stop()
    print(f"\n{machine.line()}; {asked.rows} rows, parallel = {asked.parallel}; the model is loaded in that time\n")
    print("| column | workers | time | rows/s | processes with a model | their memory | the workers' memory |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
