"""`mrrope serve`: what it does with its arguments. See verbs.py."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .said import say as _say


def serve(args: argparse.Namespace) -> int:
    from . import serve_net
    from .cli_serve import wish
    from .engine import binding_version
    from .engine.programs import server_program
    from .machine import machine_memory
    from .serve import plan
    from .serve_run import run

    program = server_program(binding_version())  # before a model is downloaded
    wanted = wish(args, _model(args))
    host = serve_net.require_host(wanted.host)
    ready_to_run = plan(replace(wanted, host=host), program, machine_memory())  # refuses before anything is tried
    if wanted.rpc:
        program.require_rpc()
        serve_net.require_rpc(wanted.rpc, program.rpc_server.name)
    port = serve_net.free_port(host, wanted.port)
    if port != wanted.port:
        ready_to_run = plan(replace(wanted, host=host, port=port), program, machine_memory())
    _say(f"engine  patched llama.cpp, {program.name}")
    for line in ready_to_run.lines:
        _say(line)
    url = ready_to_run.url

    def ready(seconds: float) -> None:
        page = f"; its web page: {url}/" if serve_net.has_page(url) else ""
        _say(f"ready after {seconds:.1f} s, Ctrl-C stops it{page}")
        _say('OpenAI clients: base_url as follows, any model name, api_key LLAMA_API_KEY\'s value or "none"')
        print(f"{url}/v1", flush=True)

    return run(ready_to_run, _say, ready)


def _model(args: argparse.Namespace) -> Path:
    if args.hf is None:
        return Path(args.model)
    from .hub import fetch

    return fetch(args.hf, say=_say).path
