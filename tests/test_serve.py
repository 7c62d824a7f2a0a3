"""mrrope serve: the command it makes of a file and of what was asked, what it refuses and says; nothing starts."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from mrrope_gguf import serve_net
from mrrope_gguf.cli import main
from mrrope_gguf.engine.programs import Program
from mrrope_gguf.errors import DoesNotFit, EngineTrouble, Refused
from mrrope_gguf.extend import extend
from mrrope_gguf.fit import fit
from mrrope_gguf.machine import MachineMemory
from mrrope_gguf.serve import Plan, Wish, plan
from tests import tiny

GIB = 1 << 30
ROOMY = MachineMemory(8 * GIB, 6 * GIB)
SERVER = Program(Path("/engine/bin/llama-server"), None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("serve") / "m.gguf", "llama", n_ctx=256)


def planned(path: Path, program: Program = SERVER, machine: MachineMemory | None = ROOMY, **asked: Any) -> Plan:
    env = asked.pop("env", {})
    return plan(Wish(path, **asked), program, machine, env)


def value(made: Plan, flag: str) -> str:
    """What follows a flag that is given once."""
    assert made.command.count(flag) == 1
    return made.command[made.command.index(flag) + 1]


def extended(plain: Path, tmp_path: Path, **options: Any) -> Path:
    return extend(plain, tmp_path / "extended.gguf", scale=4, **options).path


def test_a_file_as_it_came(plain: Path) -> None:
    made = planned(plain)
    assert made.command[:3] == ("/engine/bin/llama-server", "-m", str(plain))
    assert {flag: value(made, flag) for flag in ("-c", "-ctk", "-ctv", "-fa", "-np", "--host", "--port")} == {
        "-c": "256", "-ctk": "f16", "-ctv": "f16", "-fa": "on", "-np": "4", "--host": "127.0.0.1", "--port": "8080"
    }  # fmt: skip
    assert {"-kvu", "--jinja"} < set(made.command)
    assert not any(word.startswith("--rope") for word in made.command)
    assert made.url == "http://127.0.0.1:8080"
    assert made.lines[:2] == (
        "model   m.gguf: 256 tokens, 4 slots that share them",
        "table   none: the file is not extended",
    )
    assert "address 127.0.0.1:8080, this machine only" in made.lines


@pytest.mark.parametrize("rendering", ["engine", "portable"])
def test_an_extended_file(plain: Path, tmp_path: Path, rendering: Any) -> None:
    made = planned(extended(plain, tmp_path, rendering=rendering))
    assert (value(made, "-c"), value(made, "--rope-elastic")) == ("1024", "on")
    assert "--rope-scaling" not in made.command
    assert made.lines[1].startswith("table   mrrope-uni, elastic: the original model up to 256 tokens")
    made = planned(tmp_path / "extended.gguf", elastic=False, n_ctx=512)
    assert (value(made, "-c"), value(made, "--rope-elastic")) == ("512", "off")
    assert made.lines[1] == "table   mrrope-uni, S = 4 from the first token on"


def test_a_file_with_a_static_table(plain: Path, tmp_path: Path) -> None:
    path = extended(plain, tmp_path, elastic=False)
    assert value(planned(path), "--rope-elastic") == "off"
    assert value(planned(path, elastic=True), "--rope-elastic") == "on"


def test_a_table_by_flags(plain: Path) -> None:
    made = planned(plain, scale=4.0)
    flags = ("--rope-scaling", "--rope-scale", "--rope-elastic", "-c")
    assert [value(made, flag) for flag in flags] == ["mrrope-uni", "4.0", "on", "1024"]
    made = planned(plain, method="mrrope-pro", n_ctx=768, elastic=False)
    assert [value(made, flag) for flag in flags] == ["mrrope-pro", "3.0", "off", "768"]


@pytest.mark.parametrize(
    ("asked", "says", "fix"),
    [
        ({"n_ctx": 512}, "512 tokens of context, and the file has 256", "--scale 2 as it is"),
        ({"n_ctx": 2048, "scale": 4.0}, "2048 tokens of context, and the table has 1024", "--scale 8"),
        ({"n_ctx": 1024, "n_slots": 2}, "512 tokens of context for each slot, and the file has 256", "--scale 2 as it"),
        ({"n_ctx": 1024, "n_slots": 4, "unified": True}, "1024 tokens of context, and the file", "--scale 4 as it is"),
        ({"elastic": True}, "--elastic without a table", "--scale 4"),
        ({"method": "mrrope-pro"}, "S = 0 stretches nothing", "--scale 4"),
        ({"scale": 0.5}, r"S = 0\.5 stretches nothing", "--scale 4"),
        ({"scale": float("nan")}, "S = nan stretches nothing", "--scale 4"),
        ({"n_slots": 300}, "no context left for a slot", "-np"),
        ({"extra": ("--temp", "0", "--port", "1")}, "--port after --", "--port"),
        ({"extra": ("--host", "0.0.0.0")}, "--host after --", "--host"),
        ({"extra": ("--rope-scaling", "yarn")}, "--rope-scaling after --", "--method"),
        ({"extra": ("--api-key", "secret")}, "not as an argument", "LLAMA_API_KEY"),
    ],
)
def test_refusals(plain: Path, asked: dict[str, Any], says: str, fix: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        planned(plain, **asked)
    assert fix in caught.value.fix


def test_refusals_of_tables(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="for a file as it came"):
        planned(extended(plain, tmp_path), scale=2.0)
    static = tiny.make(tmp_path / "s.gguf", "maincoder", n_ctx=256)
    with pytest.raises(Refused, match="no elastic context for architecture 'maincoder'"):
        planned(static, scale=2.0, elastic=True)
    assert value(planned(static, scale=2.0), "--rope-elastic") == "off"
    with pytest.raises(Refused, match="has no RoPE"):
        planned(tiny.make(tmp_path / "g.gguf", "gpt2", n_ctx=256), scale=2.0)
    trained = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
    with pytest.raises(Refused, match="trained with a scaling of its own"):
        planned(tiny.make(tmp_path / "y.gguf", "qwen2", n_ctx=256, extra=trained), scale=2.0)


def test_slots_and_their_memory(plain: Path) -> None:
    whole = planned(plain, n_slots=4, n_ctx=1024)  # as much for each slot as the file has
    assert whole.lines[0] == "model   m.gguf: 1024 tokens, 4 slots of 256 tokens"
    assert value(whole, "-c") == "1024"
    assert planned(plain, n_slots=2).lines[0] == "model   m.gguf: 256 tokens, 2 slots of 256 tokens"
    assert "-no-kvu" in planned(plain, n_slots=2).command
    assert planned(plain, n_slots=2, unified=True).lines[0].endswith("2 slots that share them")
    assert planned(plain, n_slots=1).lines[0].endswith("1 slot of 256 tokens")
    sizes = [fit(plain, 256, n_batch=2048, n_seq_max=n, kv_unified=n == 4).total for n in (4, 1)]
    for total, n_slots in zip(sizes, (None, 1), strict=True):
        assert f"= {total / (1 << 20):.1f} MiB; 6.0 GiB of 8.0 GiB are free" in planned(plain, n_slots=n_slots).lines[2]


def test_what_does_not_fit(smollm2: Path) -> None:
    """The refusal names what would fit, and that is so."""
    tight = MachineMemory(GIB, 480 << 20)
    with pytest.raises(DoesNotFit, match="8192 tokens of context do not fit in memory") as caught:
        planned(smollm2, machine=tight, n_slots=1)
    assert "256.0 MiB for the server itself, and 480.0 MiB of 1.0 GiB are free" in caught.value.why
    first, second = caught.value.fix.split("; ")[0].split(", or ")
    assert second.endswith("-ctk q8_0 -ctv q8_0")
    sizes = [int(way.split()[1]) for way in (first, second)]
    assert 256 < sizes[0] < sizes[1]
    planned(smollm2, machine=tight, n_slots=1, n_ctx=sizes[0])
    planned(smollm2, machine=tight, n_slots=1, n_ctx=sizes[1], type_k="q8_0", type_v="q8_0")
    with pytest.raises(DoesNotFit):
        planned(smollm2, machine=tight, n_slots=1, n_ctx=sizes[0] + 256)
    assert planned(smollm2, machine=tight, n_slots=1, force=True).command
    assert planned(smollm2, machine=tight, n_slots=1, rpc=("box:50052",)).command  # the memory is elsewhere


def test_the_mildest_help_comes_first(smollm2: Path) -> None:
    need = [fit(smollm2, 8192, kind, kind, n_batch=2048).total for kind in ("q8_0", "f16")]
    between = MachineMemory(GIB, sum(need) // 2 + (256 << 20))
    with pytest.raises(DoesNotFit) as caught:
        planned(smollm2, machine=between, n_slots=1, flash_attn="off")
    assert caught.value.fix.startswith("-ctk q8_0 -ctv q8_0 -fa on, or -c ")
    planned(smollm2, machine=between, n_slots=1, type_k="q8_0", type_v="q8_0")
    with pytest.raises(DoesNotFit) as caught:
        planned(smollm2, machine=MachineMemory(GIB, 1 << 20))
    assert caught.value.fix.startswith("close other programs")


def test_conversations_that_wait_get_half_of_what_is_left(plain: Path) -> None:
    assert value(planned(plain), "--cache-ram") in ("2943", "2944")
    assert value(planned(plain, cache_ram=5), "--cache-ram") == "5"
    assert value(planned(plain, machine=MachineMemory(999 * GIB, 900 * GIB)), "--cache-ram") == "8192"
    assert "--cache-ram" not in planned(plain, machine=None).command
    assert planned(plain, cache_ram=-1).lines[2].endswith("; no limit for conversations that wait")


def test_an_address_that_others_reach_is_said(plain: Path) -> None:
    open_ = [line for line in planned(plain, host="0.0.0.0").lines if line.startswith("warning")]
    assert open_ == [
        "warning: port 8080 is open to every network this machine is in: no API key is set, so anyone there may use it "
        "(LLAMA_API_KEY); what is said goes unencrypted"
    ]
    keyed = planned(plain, host="192.168.1.5", env={"LLAMA_API_KEY": "secret"})
    assert any("all who reach 192.168.1.5: who has the API key may use it" in line for line in keyed.lines)
    assert keyed.env["LLAMA_API_KEY"] == "secret"
    assert "secret" not in " ".join((*keyed.command, *keyed.lines))
    tls = planned(plain, host="::", extra=("--ssl-cert-file", "c.pem", "--ssl-key-file", "k.pem"))
    assert tls.url == "https://[::1]:8080"
    assert not any("unencrypted" in line for line in tls.lines)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert not any(line.startswith("warning") for line in planned(plain, host=host).lines)


def test_other_pages_in_the_browser_are_kept_out(plain: Path) -> None:
    assert value(planned(plain), "--cors-origins") == "localhost"
    assert "--cors-origins" not in planned(plain, host="0.0.0.0").command
    assert value(planned(plain, extra=("--cors-origins", "*")), "--cors-origins") == "*"


def test_flags_that_are_passed_on(plain: Path) -> None:
    asked: dict[str, Any] = {"n_gpu_layers": "12", "threads": 3, "threads_batch": 5, "rpc": ("a:1", "b:2")}
    made = planned(plain, **asked, extra=("--temp", "0", "--api-prefix", "/llm"))
    assert [value(made, flag) for flag in ("-ngl", "-t", "-tb", "--rpc")] == ["12", "3", "5", "a:1,b:2"]
    assert made.command[-4:] == ("--temp", "0", "--api-prefix", "/llm")
    assert made.url == "http://127.0.0.1:8080/llm"
    assert (value(made, "-lv"), value(planned(plain, verbose=True), "-lv")) == ("2", "4")
    assert "-lv" not in planned(plain, extra=("-v",)).command


def test_variables_that_the_command_line_settles_are_not_passed_on(plain: Path) -> None:
    env = {"LLAMA_ARG_PORT": "1", "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_ARG_TEMP": "0.5", "PATH": "/bin"}
    assert planned(plain, env=env).env == {"LLAMA_ARG_TEMP": "0.5", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("text", "found"),
    [("10.0.0.2", ("10.0.0.2:50052",)), ("a:1, b:2", ("a:1", "b:2")), ("[::1]:7", ("[::1]:7",))],
)
def test_rpc_servers(text: str, found: tuple[str, ...]) -> None:
    assert serve_net.rpc_servers(text) == found


@pytest.mark.parametrize("text", ["", ",", "a:b", ":1", "a:0", "a:99999"])
def test_what_is_no_rpc_server(text: str) -> None:
    with pytest.raises(Refused, match="--rpc"):
        serve_net.rpc_servers(text)


def test_an_rpc_server_that_is_not_there() -> None:
    with pytest.raises(EngineTrouble, match="no RPC server answers there") as caught:
        serve_net.require_rpc([f"127.0.0.1:{serve_net.free_port('127.0.0.1', 0)}"], "ggml-rpc-server")
    assert "ggml-rpc-server --host ADDRESS --port" in caught.value.fix


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(Refused, match=f"127.0.0.1:{port}: the port is taken") as caught:
            serve_net.free_port("127.0.0.1", port)
    assert caught.value.why == "another program listens there"
    assert int(caught.value.fix.split()[-1]) > port
    assert serve_net.free_port("127.0.0.1", 0) > 0


def test_addresses_that_are_not_ours() -> None:
    with pytest.raises(Refused, match="the server cannot listen there") as caught:
        serve_net.free_port("192.0.2.1", 8080)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRNOTAVAIL
    with pytest.raises(Refused, match="no such address"):
        serve_net.free_port("no-such-host.invalid", 8080)
    for host in ("a,b", "/tmp/x.sock", ""):
        with pytest.raises(Refused, match="one address"):
            serve_net.require_host(host)
    assert serve_net.require_host("[::1]") == "::1"


def test_the_command_line_says_what_is_wrong(plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Everything is refused before a server is looked for, or because there is none."""
    monkeypatch.setenv("MRROPE_ENGINE", "stock")
    assert main(["serve", str(plain)]) == 1
    assert "MRROPE_ENGINE=stock: serve runs the patched llama-server" in capsys.readouterr().err
    assert main(["serve", "-hf", "nobody/nothing"]) == 1  # before anything is downloaded
    assert "MRROPE_ENGINE=stock" in capsys.readouterr().err
    for words in (["serve"], ["serve", "a", "-hf", "b/c"], ["serve", "a", "--port", "99999"], ["serve", "a", "--temp"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2


def test_variables_of_llama_cpp_are_defaults(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrrope_gguf.cli import _parser
    from mrrope_gguf.cli_serve import wish

    env = {"CTX_SIZE": "128", "HOST": "::", "KV_UNIFIED": "1", "CACHE_TYPE_K": "q8_0", "N_PARALLEL": "-1"}
    for name, text in {**env, "ROPE_ELASTIC": "off", "RPC": "box", "CACHE_RAM": "-1"}.items():
        monkeypatch.setenv(f"LLAMA_ARG_{name}", text)
    found = wish(_parser().parse_args(["serve", str(plain), "-c", "64", "--port", "0"]), plain)
    assert (found.n_ctx, found.port, found.host, found.unified, found.type_k) == (64, 0, "::", True, "q8_0")
    assert (found.n_slots, found.elastic, found.rpc, found.cache_ram) == (None, False, ("box:50052",), -1)
    for name, text in (("CACHE_TYPE_K", "q9"), ("PORT", "eighty"), ("KV_UNIFIED", "maybe")):
        with monkeypatch.context() as wrong:
            wrong.setenv(f"LLAMA_ARG_{name}", text)
            with pytest.raises(Refused, match=f"LLAMA_ARG_{name}={text}"):
                wish(_parser().parse_args(["serve", str(plain)]), plain)


def test_without_page(plain: Path) -> None:
    assert "--no-ui" in planned(plain, page=False).command
    assert not {"--no-ui", "--path"} & set(planned(plain).command)
