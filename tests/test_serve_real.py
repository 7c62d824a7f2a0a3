"""mrrope serve with a real llama-server: clients, signals, RPC servers, errors of the start, the page in Chromium."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf.engine.page import add_page, has_npm
from mrrope_gguf.engine.store import read_engine
from mrrope_gguf.extend import extend
from tests import hub_server
from tests.browser import CHROMIUM, browser
from tests.elastic_chat import SCALE, TURNS, elastic_pair
from tests.served import command, environment, listening, serving, text_of
from tests.server import ask, healthy

pytestmark = [
    pytest.mark.engine,
    pytest.mark.real,
    pytest.mark.skipif("MRROPE_TEST_FULL" not in os.environ, reason="compiles llama-server: `make test-full`"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]

RETRIEVER = Path(__file__).parent / "data" / "retriever-256.gguf"
BEES = [{"role": "user", "content": "Say in one sentence what a beehive is."}]
STORY = [{"role": "user", "content": "Tell a long story about the sea, with many ships."}]


def failing(programs: Path, *arguments: str | Path, **env: str) -> str:
    """What a `mrrope serve` that ends at once says."""
    ended = subprocess.run(
        command(*arguments), env=environment(programs, **env), capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, ""), ended.stderr
    return ended.stderr


@pytest.fixture(scope="module")
def elastic(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose window is 128 tokens, extended to 512: stages come early."""
    return elastic_pair(smollm2, tmp_path_factory.mktemp("serve"))[1]


def test_the_openai_client_streams_and_the_scale_follows(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic, "-np", "1") as served:
        words = text_of(served.stream(BEES, 24))
        assert len(words) > 3
        assert "A beehive is a" in "".join(words)
        assert [slot["rope_scale"] for slot in ask(served.address, "/slots")] == [1.0]
        assert text_of(served.stream([{"role": "user", "content": " ".join(TURNS)}], 8))
        assert 1 < ask(served.address, "/slots")[0]["rope_scale"] <= SCALE
        assert ask(served.address, "/v1/models")["data"][0]["id"] == "elastic"
        assert ask(served.address, "/props")["default_generation_settings"]["n_ctx"] == 512
        assert "model   elastic.gguf: 512 tokens, 1 slot of 512 tokens" in served.said
        assert "elastic: the original model up to 128 tokens, then S grows from 1 to 4" in served.said
        assert served.said.count("\n") < 12  # quiet but for warnings
        served.process.send_signal(signal.SIGTERM)
        assert served.ends() == 0
        assert not healthy(served.address)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("host", [None, "127.0.0.2", "0.0.0.0", "::1"])
def test_it_listens_where_it_was_told_and_nowhere_else(programs: Path, host: str | None) -> None:
    """The socket itself, whatever the command line says: 127.0.0.1 unless told."""
    with serving(programs, RETRIEVER, *([] if host is None else ["--host", host])) as served:
        assert listening(served.process.pid) == {host or "127.0.0.1"}
        port = int(served.address.rpartition(":")[2])
        reached = {there for there in ("127.0.0.1", "127.0.0.2", "::1") if reachable(there, port)}
        assert reached == ({"127.0.0.1", "127.0.0.2"} if host == "0.0.0.0" else {host or "127.0.0.1"})


def reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_model_from_the_hub(programs: Path, elastic: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    repos = {"someone/model": hub_server.Repo({"model-Q4_K_M.gguf": elastic.read_bytes()})}
    with hub_server.serving(repos) as hub:
        env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        with serving(programs, "-hf", "someone/model", **env) as served:
            assert "fetching someone/model: model-Q4_K_M.gguf" in served.said
            assert ask(served.address, "/v1/models")["data"][0]["id"] == "model-Q4_K_M"
            assert text_of(served.stream(BEES, 2))


def test_a_file_that_was_not_extended(programs: Path, smollm2: Path) -> None:
    with serving(
        programs, smollm2, "--method", "mrrope-pro", "--scale", "2", "-np", "2", "-kvu", "-ctk", "q8_0"
    ) as served:
        assert ask(served.address, "/props")["rope"] == {"method": "mrrope-pro", "scale": 2.0, "elastic": True}
        assert len(ask(served.address, "/slots")) == 2
        assert ask(served.address, "/props")["default_generation_settings"]["n_ctx"] == 16384


@pytest.mark.parametrize("rendering", ["engine", "portable"])
def test_static_tables(programs: Path, smollm2: Path, tmp_path: Path, rendering: Any) -> None:
    path = extend(smollm2, tmp_path / "long.gguf", scale=2, rendering=rendering).path
    with serving(programs, path, "-c", "2048", "--static", "--", "--seed", "7") as served:
        assert ask(served.address, "/props")["rope"] == {"method": "mrrope-uni", "scale": 2.0, "elastic": False}
        assert ask(served.address, "/props")["default_generation_settings"]["params"]["seed"] == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_an_answer_is_under_way(programs: Path, elastic: Path, number: int) -> None:
    with serving(programs, elastic) as served:
        stream = iter(served.stream(STORY, 400))
        for _ in range(5):
            next(stream)
        served.process.send_signal(number)
        assert served.ends(15) == 0
        assert "stopped, with answers under way" in served.said
        assert not healthy(served.address)


def test_the_second_ctrl_c_ends_it_at_once(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic) as served:
        stream = iter(served.stream(STORY, 400))
        next(stream)
        served.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        start = time.monotonic()
        served.process.send_signal(signal.SIGINT)
        assert served.ends() == 128 + signal.SIGKILL
        assert time.monotonic() - start < 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process that its parent is gone")
def test_no_server_is_left_behind(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic) as served:
        served.process.kill()
        served.process.wait()
        deadline = time.monotonic() + 20
        while healthy(served.address):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_an_api_key_by_the_environment(programs: Path, elastic: Path) -> None:
    openai: Any = pytest.importorskip("openai")
    with serving(programs, elastic, LLAMA_API_KEY="open sesame") as served:
        assert text_of(served.stream(BEES, 2, "open sesame"))
        with pytest.raises(openai.AuthenticationError):
            served.stream(BEES, 2, "shut")
        listed = subprocess.run(["ps", "-A", "-ww", "-o", "args"], capture_output=True, text=True, check=True).stdout
        assert str(elastic) in listed
        assert "sesame" not in listed + served.said


def test_an_open_address_is_said(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic, "--host", "0.0.0.0") as served:
        assert served.address.startswith("http://127.0.0.1:")
        assert (
            "is open to every network this machine is in: no API key is set, so anyone there may use it" in served.said
        )


def test_pages_of_other_origins_get_no_answer(programs: Path, elastic: Path) -> None:
    import urllib.request

    with serving(programs, elastic) as served:
        for origin, allowed in (("https://example.org", None), ("http://localhost:3000", "http://localhost:3000")):
            request = urllib.request.Request(f"{served.address}/v1/models", headers={"Origin": origin})
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.headers.get("Access-Control-Allow-Origin") == allowed


def test_a_port_that_another_server_has(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic) as served:
        port = served.address.rpartition(":")[2]
        said = failing(programs, elastic, "--port", port)
        assert f"error: 127.0.0.1:{port}: the port is taken" in said
        assert "why: a llama-server listens there" in said


def test_what_llama_server_refuses_is_said(programs: Path, elastic: Path) -> None:
    said = failing(programs, elastic, "--port", "0", "--", "--no-such-flag")
    assert "error: llama-server did not start" in said
    assert "invalid argument: --no-such-flag" in said


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def rpc_server(programs: Path) -> Iterator[str]:
    """The host:port of an RPC server on the loopback device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [programs / "ggml-rpc-server", "--host", "127.0.0.1", "--port", str(port), "-t", "1"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not listens(port):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def test_layers_on_two_rpc_servers(programs: Path, elastic: Path) -> None:
    """Each of them holds part of the weights and of the cache, and the answers are those of one machine."""
    if not (programs / "ggml-rpc-server").is_file():
        pytest.skip("these programs were built without ggml-rpc-server")
    long = [{"role": "user", "content": " ".join(TURNS)}]
    with serving(programs, elastic, "-np", "1") as alone:
        wanted = text_of(alone.stream(BEES, 16)), text_of(alone.stream(long, 16))
    with rpc_server(programs) as first, rpc_server(programs) as second:
        servers = f"{first},{second}"
        with serving(programs, elastic, "-np", "1", "--rpc", servers, "-ngl", "99", "-v") as served:
            assert (text_of(served.stream(BEES, 16)), text_of(served.stream(long, 16))) == wanted
            assert 1 < ask(served.address, "/slots")[0]["rope_scale"] <= SCALE
            said = served.said.splitlines()
        for server in (first, second):
            for what in ("model buffer size", "KV buffer size"):
                assert [line for line in said if server in line and what in line], f"{server} holds no {what}"
    said_ = failing(programs, elastic, "--rpc", servers)
    assert f"error: --rpc {first}: no RPC server answers there" in said_


@pytest.fixture(scope="module")
def page(programs: Path) -> Path:
    """The engine's web page, built by npm where it is not there: 2 minutes, once."""
    engine = read_engine(programs.parent)
    if CHROMIUM is None or engine is None:
        pytest.skip("no Chromium here" if engine else f"{programs.parent} is no build of ours")
    if not has_npm():
        pytest.skip("npm is not here")
    built = add_page(engine, None, print)
    assert built is not None
    return built


@pytest.mark.parametrize("key", ["", "open-sesame"], ids=["open", "with a key"])
def test_the_page_in_a_browser(programs: Path, smollm2: Path, page: Path, tmp_path: Path, key: str) -> None:
    """Type, send, see the answer; with an API key the page asks for it first. MRROPE_SCREENSHOT keeps the picture."""
    path = extend(smollm2, tmp_path / "SmolLM2-135M-32k.gguf", scale=4).path
    env = {"LLAMA_API_KEY": key} if key else {}
    with serving(programs, path, "--", "--temp", "0", "--predict", "120", **env) as served, browser() as tab:
        assert f"its web page: {served.address}/" in served.said
        tab.open(f"{served.address}/")
        if key:
            tab.until("document.body.innerText.includes('Enter API Key')")
            assert tab.evaluate("document.querySelector('textarea') === null")
            tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.includes('API Key')).click()")
            tab.type("input", key)
        tab.type("textarea", BEES[0]["content"])
        tab.until("document.body.innerText.includes('A beehive is a')")
        tab.until("!document.body.innerText.includes('Stop')")
        picture = tmp_path / "page.png"
        tab.screenshot(picture)
        assert picture.stat().st_size > 10_000
        if "MRROPE_SCREENSHOT" in os.environ and not key:
            Path(os.environ["MRROPE_SCREENSHOT"]).write_bytes(picture.read_bytes())


def test_without_a_page(programs: Path, elastic: Path) -> None:
    with serving(programs, elastic, "--no-page") as served:
        assert "web page" not in served.said
        assert ask(served.address, "/health") == {"status": "ok"}


def test_two_people_at_once(programs: Path, elastic: Path) -> None:
    """The four slots of the default answer side by side."""
    with serving(programs, elastic) as served:
        found: dict[int, str] = {}

        def answer(i: int) -> None:
            found[i] = "".join(text_of(served.stream(BEES, 12)))

        threads = [threading.Thread(target=answer, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all("A beehive is a" in text for text in found.values())
        assert len(found) == 2
