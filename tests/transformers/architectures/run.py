"""The command: examines every class in worker processes that stay alive, and writes JSON lines and a Markdown table."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import find, table

LIMIT = 90  # seconds for one class


class Worker:
    """A worker process; a new one takes over when it dies or takes too long."""

    def __init__(self):
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[1 + __package__.count(".")],
            env={**os.environ, "MTLFLASHATTN_SHIM": "on", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        self.answers = queue.Queue()
        self.reader = threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True)
        self.reader.start()

    @staticmethod
    def _read(process, answers):
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def examine(self, name):
        fresh = self.process is None
        if fresh:
            self.start()
        with contextlib.suppress(BrokenPipeError):  # it has died since; then it gives no answer either
            print(name, file=self.process.stdin, flush=True)
        try:
            line = self.answers.get(timeout=LIMIT + 30 * fresh)
        except queue.Empty:
            line = f"no answer within {LIMIT} s"
        else:
            if line is not None:
                return json.loads(line)
            line = f"the process ended with {self.process.wait()}"
        self.stop()
        return {"name": name, "status": "died", "error": line, "cases": {}}

    def stop(self):
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with contextlib.suppress(BrokenPipeError):  # what it has not read
                self.process.stdin.close()
            self.reader.join()  # it has read all there was
            self.process.stdout.close()
            self.process = None


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.transformers.architectures", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="only classes whose name contains one of these")
    parser.add_argument("--results", type=Path, help="JSON lines; classes that are in it are not run again")
    parser.add_argument("--again", default="", help="run classes again whose status is one of these, by commas")
    parser.add_argument("--markdown", type=Path, help="write this version's section of the table into a file")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="list the classes and end")
    arguments = parser.parse_args()
    names, others, missing = find.survey()
    names = [n for n in names if not arguments.patterns or any(p in n for p in arguments.patterns)]
    if arguments.list:
        print("\n".join(names), f"{len(names)} support FlashAttention 2, {others} do not", missing, sep="\n")
        return
    done = {}
    if arguments.results and arguments.results.exists():
        done = {r["name"]: r for r in map(json.loads, arguments.results.read_text().splitlines())}
    again = set(arguments.again.split(","))
    todo = queue.Queue()
    for name in names:
        if name not in done or done[name]["status"] in again:
            todo.put(name)
    began, lock = time.time(), threading.Lock()

    def work():
        worker = Worker()
        while True:
            try:
                name = todo.get_nowait()
            except queue.Empty:
                break
            report = worker.examine(name)
            with lock:
                done[name] = report
                if arguments.results:
                    with arguments.results.open("a") as file:
                        file.write(json.dumps(report) + "\n")
                report.setdefault("version", importlib.metadata.version("transformers"))
                words = "" if report["status"] == "equal" else table.reason(report)
                print(f"{report['status']:12} {report.get('seconds', 0):6.2f} {name}  {words}", flush=True)
        worker.stop()

    threads = [threading.Thread(target=work) for _ in range(arguments.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{time.time() - began:.0f} s")
    version = importlib.metadata.version("transformers")
    reports = [done[name] for name in names if name in done]
    for report in reports:
        report.update(version=version, exported=find.is_exported(report["name"]))
    if arguments.markdown:
        seconds = sum(report.get("seconds", LIMIT) for report in reports)
        table.write(arguments.markdown, version, table.markdown(reports, others, missing, version, seconds))
