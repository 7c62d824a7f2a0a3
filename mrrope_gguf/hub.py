"""`-hf user/model[:quant]`: a model from the Hugging Face Hub, fetched into the cache that all its programs share.

huggingface_hub (extra `hub`) does the fetching, so its environment holds: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE. Without network, what the cache has is taken.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FileTrouble, MrropeError, Refused
from .hub_names import Wanted, choose, models, parse
from .text import printable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

Say = Callable[[str], object]

INSTALL = "pip install 'mrrope-gguf[hub]'"
TIMEOUT = 10  # seconds until the Hub must have answered
_NETWORK = frozenset(("httpx", "httpx2", "httpcore", "requests", "urllib3"))
_DISK = frozenset((errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)))


@dataclass(frozen=True)
class Fetched:
    """A model in the cache. `path` is the file to open, the first of `files` (names in the repository)."""

    path: Path
    repo: str
    files: tuple[str, ...]
    size: int  # bytes, all files


def fetch(name: str, *, say: Say | None = None) -> Fetched:
    """The model that `name` means (see hub_names.parse), downloaded unless it lies in the cache.

    say(line): called before anything slow and where the cache is taken for want of a network. The download draws
    huggingface_hub's own bar on a terminal; a connection that breaks off is taken up where it was (huggingface_hub 2.4;
    1.0 gives up). A process that was stopped starts its file anew, but keeps the shards that were whole.
    Raises Refused for what the Hub does not have or does not give, FileTrouble where the cache cannot take it,
    MrropeError without huggingface_hub or without network.
    """
    wanted = parse(name)
    try:
        import huggingface_hub
    except ImportError:
        fix = f"{INSTALL}, or download the file yourself and name it without -hf"
        raise MrropeError(f"{wanted}: -hf needs huggingface_hub", why="it is not installed", fix=fix) from None
    try:
        info = huggingface_hub.HfApi().model_info(wanted.repo, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:
        return _without_network(wanted, error, say)
    listed = {file.rfilename: file for file in info.siblings or []}
    files = choose(wanted, listed)
    lacking = [listed[file] for file in files if not _has(wanted.repo, info, listed[file])]
    _require_space(wanted, lacking)
    if say and lacking:
        say(f"fetching {wanted.repo}: {', '.join(printable(file.rfilename) for file in lacking)}{_size(lacking)}")
    return _downloaded(wanted, files)


def cached(repo: str) -> dict[str, Path]:
    """The files of a repository that lie in the cache whole, by name; the newest revision's first."""
    found: dict[str, Path] = {}
    for snapshot in _snapshots(repo):
        for name in _ggufs(snapshot):
            found.setdefault(name, snapshot / name)
    return found


def _downloaded(wanted: Wanted, files: tuple[str, ...]) -> Fetched:
    import huggingface_hub

    paths = []
    for file in files:
        try:
            # -hf asks for what the Hub has now, as llama.cpp does; its client checks what it downloads by its hash
            paths.append(Path(huggingface_hub.hf_hub_download(wanted.repo, file)))  # nosec B615
        except Exception as error:
            raise _refusal(wanted, error) or _broken_off(wanted, file, error) from error
    if len({path.parent for path in paths}) > 1:
        raise MrropeError(
            f"{wanted}: the repository changed while it was fetched",
            why="its parts are of different revisions",
            fix="run the same command again",
        )
    return Fetched(paths[0], wanted.repo, files, sum(path.stat().st_size for path in paths))


def _without_network(wanted: Wanted, error: Exception, say: Say | None) -> Fetched:
    """What the cache has of `wanted`, where the Hub could not be asked; its refusals are raised."""
    if refusal := _refusal(wanted, error):
        raise refusal from error
    there = cached(wanted.repo)
    for snapshot in _snapshots(wanted.repo):
        try:
            files = choose(wanted, _ggufs(snapshot))
        except Refused:
            continue
        if say:
            say(
                f"{wanted.repo}: the Hub cannot be asked ({_reason(error)}); the cache's {printable(files[0])} is taken"
            )
        paths = [snapshot / file for file in files]
        return Fetched(paths[0], wanted.repo, files, sum(path.stat().st_size for path in paths))
    what = f"{_endpoint()}/{wanted.repo}/" + (f"resolve/main/{wanted.file}" if wanted.file else "tree/main")
    file = wanted.file or f"the {wanted.quant or 'Q4_K_M'} file"
    wait = "wait and run it again, or " if hasattr(error, "response") else ""
    usable = ", ".join(f"{wanted.repo}/{printable(name)}" for name in models(there))
    raise MrropeError(
        f"{wanted}: cannot be fetched, and the cache does not have it",
        why=f"{_reason(error)}; cached of this repository: {usable or 'nothing'}",
        fix=f"{wait}download {file} from {what} elsewhere, bring it here and name its path instead of -hf",
    ) from error


def _refusal(wanted: Wanted, error: Exception) -> MrropeError | None:
    """The Hub's own answer as an error of ours; None where there was none, so that the cache may serve."""
    from huggingface_hub import errors, get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "the token that is set may not see it" if get_token() else "no token is set"
    login = "set HF_TOKEN, or log in: hf auth login"
    if isinstance(error, errors.GatedRepoError):
        page = f"{_endpoint()}/{wanted.repo}"
        return Refused(
            f"{wanted}: this repository is gated",
            why=f"its owner gives access to those who ask for it, and {token}",
            fix=f"ask on {page}, then {login}",
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return Refused(
            f"{wanted}: there is no such repository on {_endpoint()}",
            why=f"it does not exist, or it is private and {token}",
            fix=f"check the name; for a private one {login}",
        )
    if isinstance(error, (errors.EntryNotFoundError, errors.RevisionNotFoundError)) and status == 404:
        fix = "run the same command again"
        return Refused(f"{wanted}: the file is gone from the repository", why=_reason(error), fix=fix)
    if status == 401:
        fix = "make a new token on the Hub and set HF_TOKEN, or unset it"
        return Refused(f"{wanted}: the Hub refuses the token", why=_reason(error), fix=fix)
    if status is not None and 400 <= status < 500 and status not in (408, 429):
        return Refused(f"{wanted}: the Hub refuses", why=_reason(error), fix="check the name and the token")
    if isinstance(error, OSError) and error.errno in _DISK:
        return FileTrouble(
            f"{wanted}: the cache {_cache()} cannot take it",
            why=error.strerror or str(error),
            fix="free some space, or let HF_HOME name a folder that can be written",
        )
    if status is None and not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK:
        return MrropeError(
            f"{wanted}: what {_endpoint()} answers cannot be used",
            why=_reason(error),
            fix="check HF_ENDPOINT and the proxy; MRROPE_DEBUG=1 shows where",
        )
    return None


def _broken_off(wanted: Wanted, file: str, error: Exception) -> MrropeError:
    file = printable(file)
    return MrropeError(
        f"{wanted}: the download of {file} broke off",
        why=_reason(error),
        fix=f"run the same command again, or download it from {_endpoint()}/{wanted.repo}/resolve/main/{file}",
    )


def _reason(error: BaseException) -> str:
    """An error of huggingface_hub in one line: its innermost cause says what happened."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    while status is None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = printable(lines[0] if lines else type(error).__name__, limit=200)
    return f"HTTP status {status}: {told}" if status and str(status) not in told else told


def _has(repo: str, info: ModelInfo, file: RepoSibling) -> bool:
    """Whether this file, or its very bytes under another revision, lie in the cache."""
    folder = _folder(repo)
    digest = getattr(file.lfs, "sha256", None)
    return (folder / "snapshots" / str(info.sha) / file.rfilename).is_file() or bool(
        digest and (folder / "blobs" / digest).is_file()
    )


def _require_space(wanted: Wanted, lacking: list[RepoSibling]) -> None:
    needed = sum(file.size or 0 for file in lacking)
    cache = _cache()
    there = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), None)
    free = shutil.disk_usage(there).free if there else 0
    if needed > free:
        raise FileTrouble(
            f"{wanted}: the disk has no room for this model",
            why=f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB available in {cache}",
            fix="free some space, let HF_HOME name a folder on another disk, or take a smaller quantisation",
        )


def _size(files: list[RepoSibling]) -> str:
    total = sum(file.size or 0 for file in files)
    return f" ({total / 1e9:.2f} GB)" if total >= 1e9 else f" ({total / 1e6:.1f} MB)" if total else ""


def _snapshots(repo: str) -> list[Path]:
    """The cached revisions of a repository: the one `main` was last seen at, then the newest ones."""
    folder = _folder(repo)
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except OSError:
        main = ""
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: (path.name != main, -path.stat().st_mtime))


def _ggufs(snapshot: Path) -> list[str]:
    """The GGUF files of a cached revision that are there whole; of files beside the Hub's own, none.

    The Hub's are links to blobs wherever the system has links; `mrrope extend` may have written others there.
    """
    found = sorted(snapshot.rglob("*.gguf"))
    links = [path for path in found if path.is_symlink()]
    return [path.relative_to(snapshot).as_posix() for path in links or found if path.is_file()]


def _folder(repo: str) -> Path:
    return _cache() / f"models--{repo.replace('/', '--')}"


def _cache() -> Path:
    return Path(_constants().HF_HUB_CACHE).expanduser()


def _endpoint() -> str:
    return str(_constants().ENDPOINT)


def _constants() -> Any:
    from huggingface_hub import constants

    return constants
