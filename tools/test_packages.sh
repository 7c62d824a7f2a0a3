#!/usr/bin/env bash
# What tests use if it is there, on Debian or Ubuntu: clang with libFuzzer, g++ for 32 bits, strace, and mkfs of each
# kind. Run as root.
set -euo pipefail

install() { # those that are missing
    local package missing=()
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${missing[@]}" > /dev/null
}

install clang g++-multilib strace e2fsprogs xfsprogs btrfs-progs
# libFuzzer and the sanitizers' runtimes: a package apart, named after the version
install "libclang-rt-$(clang -dumpversion | cut -d . -f 1)-dev"
