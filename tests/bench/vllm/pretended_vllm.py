"""A stand-in for the Python of an environment with vLLM: it answers as vLLM's modules would.

Started as `python -c CODE kind vocabulary FLAGS` it writes a recorded result, as
`python -m vllm.entrypoints.openai.api_server FLAGS` it serves /health until it is ended.
What it was asked goes to calls.jsonl beside it; what goes wrong is planted in plan.json.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass


def serve(plan: dict[str, object]) -> None:
    if plan.get("server") == "broken":
        sys.exit("no room for the cache")
    # An engine of its own, as vLLM has, that nobody asks to end.
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with (HERE / "engines").open("a") as file:
        file.write(f"{engine.pid}\n")
    http.server.HTTPServer(("127.0.0.1", int(flag("--port"))), Health).serve_forever()


def bench(kind: str, plan: dict[str, object]) -> None:
    if plan.get("bench") == "broken":
        sys.exit("Token id 9848 is out of vocabulary")
    result = json.loads(Path(str(plan[kind])).read_text())
    if kind == "serve":
        result["errors"] = plan.get("errors", result["errors"])
        file = Path(flag("--result-dir")) / flag("--result-filename")
    else:
        file = Path(flag("--output-json"))
        slower = 2.0 if flag("--model").endswith("slow") else 1.0
        key = "latencies" if kind == "latency" else "elapsed_time"
        said = result[key]
        result[key] = [slower * s for s in said] if kind == "latency" else slower * said
    file.write_text(json.dumps(result))


def main() -> None:
    plan = json.loads((HERE / "plan.json").read_text())
    with (HERE / "calls.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    if sys.argv[1] == "-m":
        serve(plan)
    elif "importlib.metadata" in sys.argv[2]:
        print(json.dumps(plan["releases"]))
    else:
        bench(sys.argv[3], plan)


if __name__ == "__main__":
    main()
