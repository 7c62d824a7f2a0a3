"""Models from the Hub: huggingface_hub itself against a server on the loopback device, and what can go wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mrrope_gguf.errors import FileTrouble, MrropeError, Refused
from mrrope_gguf.gguf.index import open_gguf
from mrrope_gguf.hub import Fetched, cached, fetch
from mrrope_gguf.hub_names import Wanted, choose, parse
from tests import tiny
from tests.hub_server import TOKEN, Hub, Repo, serving

QUANTS = "user/quants"
SPLIT = "user/split"


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Real GGUF files: three different models, and one in three shards."""
    folder = tmp_path_factory.mktemp("ggufs")
    for seed in range(3):
        tiny.make(folder / f"m{seed}.gguf", seed=seed)
    tiny.make(folder / "big-q8_0.gguf", split=3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(ggufs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with some repositories, and an empty cache of this test's own."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    shards = {f"Q8_0/{name}": data for name, data in ggufs.items() if name.startswith("big")}
    repos = {
        QUANTS: Repo(
            {
                "README.md": b"# a model",
                "mmproj-m-Q4_K_M.gguf": b"GGUF",
                "m-F16.gguf": ggufs["m0.gguf"],
                "m-q4_k_m.gguf": ggufs["m1.gguf"],
                "m-Q8_0.gguf": ggufs["m2.gguf"],
            }
        ),
        SPLIT: Repo(shards),
        "user/gated": Repo({"m-Q8_0.gguf": ggufs["m0.gguf"]}, gated=True),
        "user/private": Repo({"m-Q8_0.gguf": ggufs["m0.gguf"]}, private=True),
        "user/weights": Repo({"model.safetensors": b"x", "mmproj.gguf": b"GGUF"}),
    }
    with serving(repos) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield served
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()


def refused(name: str, kind: type[MrropeError] = Refused) -> MrropeError:
    with pytest.raises(kind) as caught:
        fetch(name)
    assert type(caught.value) is kind
    assert caught.value.why
    assert caught.value.fix
    return caught.value


def test_the_default_is_q4_k_m(hub: Hub, ggufs: dict[str, bytes], tmp_path: Path) -> None:
    said: list[str] = []
    found = fetch(QUANTS, say=said.append)
    assert found == Fetched(found.path, QUANTS, ("m-q4_k_m.gguf",), len(ggufs["m1.gguf"]))
    assert found.path.read_bytes() == ggufs["m1.gguf"]
    commit = hub.repos[QUANTS].commit
    assert found.path == tmp_path / "hub/models--user--quants/snapshots" / commit / "m-q4_k_m.gguf"
    assert (tmp_path / "hub/models--user--quants/refs/main").read_text() == commit
    assert said == [f"fetching user/quants: m-q4_k_m.gguf ({len(ggufs['m1.gguf']) / 1e6:.1f} MB)"]
    with open_gguf(found.path) as index:
        assert index.arch == "llama"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (f"{QUANTS}:q8_0", "m-Q8_0.gguf"),
        (f"{QUANTS}:F16", "m-F16.gguf"),
        (f"{QUANTS}/m-F16.gguf", "m-F16.gguf"),
        (f"https://huggingface.co/{QUANTS}/resolve/main/m-Q8_0.gguf?download=true", "m-Q8_0.gguf"),
    ],
)
def test_names(hub: Hub, name: str, file: str) -> None:
    found = fetch(name)
    assert found.path.name == file
    assert found.path.read_bytes() == hub.repos[QUANTS].files[file]


def test_what_is_cached_is_not_fetched_again(hub: Hub) -> None:
    first = fetch(QUANTS)
    said: list[str] = []
    assert fetch(QUANTS, say=said.append) == first
    assert said == []
    assert hub.gets("m-q4_k_m.gguf") == [""]


def test_a_new_revision_brings_the_changed_file_alone(hub: Hub, ggufs: dict[str, bytes]) -> None:
    before = fetch(SPLIT)
    hub.repos[SPLIT].files["Q8_0/big-q8_0-00002-of-00003.gguf"] += bytes(32)
    after = fetch(SPLIT)
    assert after.path != before.path
    assert [len(hub.gets(file)) for file in after.files] == [1, 2, 1]
    assert (after.path.parent / "big-q8_0-00002-of-00003.gguf").read_bytes().endswith(bytes(32))


def test_a_split_model_comes_whole(hub: Hub) -> None:
    found = fetch(f"{SPLIT}:Q8_0")
    assert [os.path.basename(file) for file in found.files] == [f"big-q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert found.path.name == "big-q8_0-00001-of-00003.gguf"
    assert found.size == sum(map(len, hub.repos[SPLIT].files.values()))
    for file in found.files:
        assert (found.path.parents[1] / file).read_bytes() == hub.repos[SPLIT].files[file]
    from mrrope_gguf import inspect

    assert len(inspect(found.path).file.shards) == 3
    assert fetch(f"{SPLIT}/Q8_0/big-q8_0-00003-of-00003.gguf") == found


def test_a_connection_that_breaks_off_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    hub.cuts = 2
    found = fetch(QUANTS)
    data = hub.repos[QUANTS].files["m-q4_k_m.gguf"]
    assert hashlib.sha256(found.path.read_bytes()).digest() == hashlib.sha256(data).digest()
    ranges = hub.gets("m-q4_k_m.gguf")
    assert len(ranges) == 3
    starts = [int(wanted.removeprefix("bytes=").rstrip("-") or 0) for wanted in ranges]
    assert 0 == starts[0] < starts[1] < starts[2] < len(data)


def test_a_split_model_cut_short_keeps_its_whole_files(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    real = huggingface_hub.hf_hub_download

    def second_breaks(repo: str, file: str) -> str:
        if "00002" in file:
            hub.cuts = 100
        return str(real(repo, file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", second_breaks)
    error = refused(SPLIT, MrropeError)
    assert error.what.endswith("00002-of-00003.gguf broke off")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", real)
    hub.cuts = 0
    hub.asked.clear()
    found = fetch(SPLIT)
    assert [len(hub.gets(file)) for file in found.files] == [0, 1, 1]


def test_a_token_is_sent_and_opens_what_is_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused("user/gated")
    assert "is gated" in error.what
    assert "no token is set" in error.why
    assert f"{hub.address}/user/gated" in error.fix
    assert "private and no token is set" in refused("user/private").why
    assert {token for _, token in hub.tokens} == {""}
    hub.tokens.clear()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch("user/gated").path.is_file()
    assert fetch("user/private").path.is_file()
    assert {token for path, token in hub.tokens if path.startswith("/cdn/")} == {""}
    assert {token for path, token in hub.tokens if not path.startswith("/cdn/")} == {TOKEN}


def test_a_wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongtoken")
    error = refused(QUANTS)
    assert "refuses the token" in error.what
    assert "hf_wrongtoken" not in str(error)


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    assert "no such repository" in refused("user/none").what
    error = refused(f"{QUANTS}:Q5_K_M")
    assert error.why == "the repository has m-F16.gguf, m-Q8_0.gguf, m-q4_k_m.gguf"
    assert "there is no such file" in refused(f"{QUANTS}/m-Q5_K_M.gguf").what
    assert "no language model" in refused(f"{QUANTS}/mmproj-m-Q4_K_M.gguf").what
    assert refused("user/weights").why == "it has mmproj.gguf, which is no language model"
    assert hub.gets(".gguf") == []


@pytest.mark.parametrize("name", ["model.gguf", "user", "a/b:c:d", "user/model/file.bin", "/a/b.gguf", ""])
def test_no_names(name: str) -> None:
    assert "names nothing on the Hub" in refused(name).what


def test_names_from_the_server_cannot_leave_the_cache(hub: Hub, tmp_path: Path) -> None:
    names = ("../../../../evil-Q4_K_M.gguf", "/evil.gguf", "fine.gguf", "x\x1b[2J.gguf")
    hub.repos[QUANTS].files = dict.fromkeys(names, b"GGUF")
    assert fetch(QUANTS).path.parent.name == hub.repos[QUANTS].commit  # of the one that is left
    with pytest.raises(Refused) as caught:
        fetch(f"{QUANTS}:Q4_K_M")
    assert caught.value.why == "the repository has fine.gguf, x\\e[2J.gguf"
    assert list(tmp_path.rglob("evil*")) == []


def test_without_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    split, one = fetch(SPLIT), fetch(f"{QUANTS}:q8_0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    said: list[str] = []
    assert fetch(SPLIT, say=said.append) == split
    assert fetch(QUANTS, say=said.append) == one  # not the default, but it is there
    assert hub.asked == []
    assert said[0].startswith("user/split: the Hub cannot be asked (HF_HUB_OFFLINE is set); the cache's Q8_0/big-q8_0-")
    error = refused(f"{QUANTS}:F16", MrropeError)
    assert error.what == "user/quants:F16: cannot be fetched, and the cache does not have it"
    assert error.why == "HF_HUB_OFFLINE is set; cached of this repository: user/quants/m-Q8_0.gguf"
    assert f"download the F16 file from {hub.address}/user/quants/tree/main" in error.fix
    assert cached("user/none") == {}


@pytest.mark.parametrize("name", [f"{QUANTS}:q8_0", SPLIT])
def test_extend_writes_nothing_into_the_cache(
    hub: Hub, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrrope_gguf.extend import ELSEWHERE, extend

    found = fetch(name)
    before = sorted(found.path.parent.iterdir())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    would, done = extend(found.path, scale=4, dry_run=True), extend(found.path, scale=4)
    assert would.elsewhere == done.elsewhere == ELSEWHERE
    assert would.path == done.path
    assert done.path.parent == tmp_path / "here"
    assert len(list((tmp_path / "here").iterdir())) == len(found.files)
    assert sorted(found.path.parent.iterdir()) == before
    # a DST is where the user wants it, and a link of one's own is no part of the cache
    assert extend(found.path, tmp_path / "x.gguf", scale=4).elsewhere == ""
    if name != SPLIT:
        (tmp_path / "mine.gguf").symlink_to(found.path)
        mine = extend(tmp_path / "mine.gguf", scale=4)
        assert (mine.path.parent, mine.elsewhere) == (tmp_path, "")


def test_an_extended_file_in_the_cache_is_not_the_hubs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from mrrope_gguf.extend import extend

    found = fetch(f"{QUANTS}:q8_0")
    extend(found.path, found.path.with_name("m-ContextLength256-Q8_0.gguf"), scale=4)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(f"{QUANTS}:q8_0") == found
    assert list(cached(QUANTS)) == ["m-Q8_0.gguf"]


def test_half_a_split_model_does_not_serve(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    (fetch(SPLIT).path.parent / "big-q8_0-00002-of-00003.gguf").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the cache does not have it" in refused(SPLIT, MrropeError).what


def test_no_server_is_one_error_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    error = refused(f"{QUANTS}/m-F16.gguf", MrropeError)
    assert "cannot be fetched" in error.what
    assert error.why.endswith("; cached of this repository: nothing")
    assert f"download m-F16.gguf from {nowhere}/user/quants/resolve/main/m-F16.gguf" in error.fix


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down_is_like_no_network(hub: Hub, status: int) -> None:
    found = fetch(QUANTS)
    hub.status = status
    assert fetch(QUANTS) == found
    assert f"{status}" in refused(f"{QUANTS}:F16", MrropeError).why


def test_a_page_that_is_no_hub(hub: Hub) -> None:
    hub.status = 200
    assert "cannot be used" in refused(QUANTS, MrropeError).what


def test_no_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "no room" in refused(QUANTS, FileTrouble).what
    assert hub.gets(".gguf") == []


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(MrropeError, match=r"user/quants"):
        fetch(QUANTS)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    error = refused(QUANTS, MrropeError)
    assert "needs huggingface_hub" in error.what
    assert "pip install 'mrrope-gguf[hub]'" in error.fix


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_as_a_user_sets_it(hub: Hub, tmp_path: Path, offline: str) -> None:
    """A process of its own, which reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""
    code = "import sys; from mrrope_gguf.hub import fetch; print(fetch(sys.argv[1]).path)"
    named = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    env = {**os.environ, **named, "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, "user/private"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if offline == "1":
        assert "HF_HUB_OFFLINE is set" in done.stderr
        assert hub.asked == []
        return
    assert Path(done.stdout.strip()).read_bytes() == hub.repos["user/private"].files["m-Q8_0.gguf"], done.stderr
    assert done.stdout.startswith(str(tmp_path / "home" / "hub"))


@pytest.mark.parametrize(
    ("quant", "names", "file"),
    [
        ("", ["b-Q8_0.gguf", "a-Q2_K.gguf"], "b-Q8_0.gguf"),
        ("", ["b-Q5_0.gguf", "a-Q6_K.gguf", "README.md"], "a-Q6_K.gguf"),
        ("F16", ["m-BF16.gguf", "m-F16.gguf"], "m-F16.gguf"),
        ("q4_k_m", ["m-Q4_K_M-imat.gguf", "m.Q4_K_M.gguf"], "m.Q4_K_M.gguf"),
        ("Q4_K_M", ["Q4_K_M/m-00001-of-00001.gguf", "Q8_0/m-00001-of-00001.gguf"], "Q4_K_M/m-00001-of-00001.gguf"),
        ("UD-Q4_K_XL", ["m-Q4_K_XL.gguf", "m-UD-Q4_K_XL.gguf"], "m-UD-Q4_K_XL.gguf"),
        ("Q8_0", ["mtp-m-Q8_0.gguf", "m-imatrix-Q8_0.gguf", "z-Q8_0.gguf"], "z-Q8_0.gguf"),
    ],
)
def test_choice(quant: str, names: list[str], file: str) -> None:
    assert choose(Wanted("u/m", quant), names) == (file,)


def test_choice_of_a_split_model_that_lacks_a_part() -> None:
    names = [f"m-Q8_0-0000{i}-of-00004.gguf" for i in (1, 2, 4)]
    with pytest.raises(Refused) as caught:
        choose(parse("u/m:q8_0"), names)
    assert caught.value.why == "3 of 4 are there; not m-Q8_0-00003-of-00004.gguf"
