"""Break the code on purpose, one place at a time, and expect a claim to fall: python tests/mutants.py [WORD ...]

mutants.csv beside the tests has a row for each: the file, a text in it, what replaces it, and the test that must turn
red. A mutant that no test of that file notices is a claim that nobody checks: the exit code says whether there is one.
With WORDs only the rows that hold them all are run. Where another test falls than the row says, the row is rewritten.
"""

import concurrent.futures
import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TABLES = (ROOT / "tests" / "mutants.csv", ROOT / "experiments" / "tests" / "mutants.csv")
NEEDS = {"test_trl_recipe": "trl", "test_real_model": "transformers"}
SECONDS = 120  # for the tests of a row; what hangs is as dead as what fails


def rows_of(table):
    """[{file, old, new, claim}]."""
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def first_failure(folder, tests):
    """The first test that fails in the folder, "a time limit" if they hang, or None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", tests]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
    environment = os.environ | {"HYPOTHESIS_PROFILE": "falls"}  # shrinking takes most of a failure's time
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # upon which its tests end what they have started, in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        return "a time limit"
    finally:  # with whatever the broken code has left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", output, re.MULTILINE)
    if process.returncode and not failed:
        raise RuntimeError(f"no test ran: {output[-500:]}")
    return failed[1] if failed else None


def killer(folder, row):
    """The test that fails with the row's text replaced, its claim if that does, or None."""
    text = (ROOT / row["file"]).read_text(encoding="utf-8")
    (folder / row["file"]).write_text(text.replace(row["old"], row["new"]), encoding="utf-8")
    try:
        return first_failure(folder, row["claim"]) or first_failure(folder, row["claim"].split("::")[0])
    finally:
        shutil.copy(ROOT / row["file"], folder / row["file"])


def main(words):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, it would be so in the tests
    tables = {table: rows_of(table) for table in TABLES}
    missing = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    chosen = [row for rows in tables.values() for row in rows if all(word in " ".join(row.values()) for word in words)]
    chosen = [row for row in chosen if not any(name in row["claim"] for name in missing)]
    survivors, mine = [], threading.local()
    with tempfile.TemporaryDirectory() as name, tqdm(total=len(chosen), disable=None) as bar:

        def copy_of_the_project():
            mine.folder = Path(name) / str(threading.get_ident())
            shutil.copytree(ROOT, mine.folder, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info"))

        def run(row):
            dead = killer(mine.folder, row)
            if dead is None:
                survivors.append(row)
            elif dead not in (row["claim"], "a time limit"):
                row["claim"] = dead
            bar.write(f"{'killed by ' + dead if dead else 'SURVIVED'}  {row['file']}: {row['old']!r} -> {row['new']!r}")
            bar.update()

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), initializer=copy_of_the_project) as pool:
            list(pool.map(run, chosen))
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    for table, rows in tables.items():
        with open(table, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ("file", "old", "new", "claim"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
