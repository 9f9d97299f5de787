"""The figures of the examples: each is run as its users run it, before and after the swap.

    python -m benchmarks.swaps [gan] [vae] [tabular] [numpy_client] [dcgan] [conditional]

Every run is a real `flwr run` of two simulated nodes. The examples set their own seeds (0 on the
server, the partition's number on a node). Prints what the server's evaluation and the nodes' said
after each round, and the seconds that the whole run took.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import shutil
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

from fl_wb.commands.launcher import launch

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "gan": [("before", "before", {}), ("after", "after", {})],
    "vae": [
        ("before", "before", {}),
        ("after, without refit", "after", {", refit=refit": ""}),
        ("after, noise=0", "after", {"noise=0.3": "noise=0"}),
        ("after", "after", {}),
    ],
    "tabular": [("before", "before", {}), ("after", "after", {})],
    "numpy_client": [("before", "before", {}), ("after", "after", {})],
    "dcgan": [("before", "before", {}), ("after", "after", {})],
    "conditional": [("before", "before", {}), ("after", "after", {})],
}
NODES = re.compile(r"configure_evaluate:.*?Aggregated MetricRecord: (\{.*?\})", re.DOTALL)
SERVER = re.compile(r"Global evaluation.*?MetricRecord: (\{.*?\})", re.DOTALL)


def run(name: str, version: str, edits: dict[str, str]) -> tuple[str, float]:
    """Run an example whose server is edited; returns the log, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(shutil.copytree(EXAMPLES / name / version, Path(folder) / "app"))
        server = app / f"{name}_app" / "server_app.py"
        text = server.read_text("utf-8")
        for old, new in edits.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        server.write_text(text, "utf-8")
        began, shown = time.perf_counter(), io.StringIO()
        with redirect_stdout(shown):
            launch({}, nodes=2, log=Path(folder) / "superlink.log", app=app)
        return shown.getvalue(), time.perf_counter() - began


def main() -> None:
    """Run the examples and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="|".join(RUNS), help="all if none is given")
    for name in parser.parse_args().names or RUNS:
        print(f"\n| {name} | figure | after each round | seconds |\n|---|---|---|---|")
        for title, version, edits in RUNS[name]:
            log, seconds = run(name, version, edits)
            for who, pattern in (("server", SERVER), ("nodes", NODES)):
                rounds = [ast.literal_eval(found) for found in pattern.findall(log)]
                for figure in rounds[0] if rounds else ():
                    values = ", ".join(f"{found[figure]:.3f}" for found in rounds)
                    print(f"| {title} | {who}: {figure} | {values} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
