"""llama.cpp's server for one GGUF file: `python server_main.py OPTIONS`, in llama.cpp's environment.

The key is read from LLAMA_API_KEY, as every user of the machine can read a command line.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=0, help="tokens of one conversation; 0 = those of the model")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plain", action="store_true", help="answers as text, without looking for calls and reasoning")
    given = parser.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = given.model, {given.alias}
    params.hostnames, params.port = [given.host], given.port
    params.api_keys = [os.environ["LLAMA_API_KEY"]]
    params.n_parallel, params.n_ctx = given.parallel, given.context * given.parallel
    params.kv_unified, params.use_jinja, params.ui, params.offline = False, True, False, True
    params.special = given.plain
    params.force_pure_content_parser = given.plain
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given.threads
    params.warmup = False
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    server = xllamacpp.Server(params)
    print(f"llama.cpp listens at {server.listening_address}", flush=True)
    while not done.wait(1):
        pass
    os._exit(0)  # the requests of others need not be waited for


if __name__ == "__main__":
    main()
