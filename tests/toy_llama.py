"""A project of three small files in llama.cpp's place, which `mrrope build` patches, compiles and installs in seconds.

`use(folder)` makes mrrope_gguf believe that patches/ holds a patch for it. As a script it builds: see `build_apart`.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RELEASE, COMMIT = "9.9.9", "c0ffee" + "0" * 34

FILES = {
    "CMakeLists.txt": """cmake_minimum_required(VERSION 3.14)
project(toy C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_WINDOWS_EXPORT_ALL_SYMBOLS ON)
add_library(ggml SHARED src/ggml.cpp)
add_library(llama SHARED src/llama-model.cpp)
target_link_libraries(llama PRIVATE ggml)
add_executable(ggml-rpc-server src/server.cpp)
target_link_libraries(ggml-rpc-server PRIVATE llama)
""",
    "src/ggml.cpp": 'extern "C" int toy_answer(void) {\n    return 42;\n}\n',
    "src/server.cpp": """extern "C" int toy_model(void);

int main() {
    return toy_model() == 42 ? 0 : 1;
}
""",
    "src/llama-model.cpp": """extern "C" int toy_answer(void);

// one
// two
// three
// four
extern "C" int toy_model(void) {
    return toy_answer();
}
""",
}

PATCH = """diff --git a/src/llama-model.cpp b/src/llama-model.cpp
--- a/src/llama-model.cpp
+++ b/src/llama-model.cpp
@@ -1,4 +1,8 @@
 extern "C" int toy_answer(void);
+
+#include "mrrope.h"
+
+extern "C" int llama_rope_table_set(void) { return 7; }

 // one
 // two
"""


def tree(folder: Path, **changed: str) -> Path:
    """The sources in `folder`; changed["src/ggml.cpp"] takes a file's place."""
    for name, text in {**FILES, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def sdist(path: Path) -> Path:
    """The sources as llama-cpp-python's sdist has them, and a file of the binding's own beside them."""
    with tarfile.open(path, "w:gz") as tar:
        root = f"llama_cpp_python-{RELEASE}"
        members = {f"{root}/vendor/llama.cpp/{name}": text for name, text in FILES.items()}
        for name, text in {**members, f"{root}/pyproject.toml": "", f"{root}/vendor/llama.cpp/.git": "gitdir"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def use(folder: Path, patch: str = PATCH, sha256: str = "0" * 64) -> None:
    """Make `folder` the place of UPSTREAM and of the one patch in it, for this process."""
    from mrrope_gguf.engine import pins

    folder.mkdir(parents=True, exist_ok=True)
    line = f"{RELEASE} {COMMIT} llama_cpp_python-{RELEASE}.tar.gz {sha256}\n"
    for name, text in (("UPSTREAM", line), (f"llama-cpp-python-{RELEASE}.patch", patch)):
        aside = folder / f"{name}.{os.getpid()}"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, folder / name)  # another process may be reading it
    pins.data_dir = lambda: folder
    pins.pins.cache_clear()


def put_sdist(cache: Path) -> str:
    """The archive where fetch_sdist keeps what it fetched; its sha256."""
    (cache / "sources").mkdir(parents=True, exist_ok=True)
    path = sdist(cache / "sources" / f"llama_cpp_python-{RELEASE}.tar.gz")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_apart(folder: Path, source: Path, cache: Path) -> subprocess.Popen[str]:
    """A process that builds `source` with the patches in `folder`: says its lines, then the engine's folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.toy_llama", str(folder), str(source)], cwd=ROOT, text=True,
        env={**os.environ, "MRROPE_CACHE": str(cache)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


if __name__ == "__main__":
    use(Path(sys.argv[1]))
    from mrrope_gguf.engine.build import build

    print(build(backend="cpu", server=False, release=RELEASE, source=sys.argv[2], say=print).path)
