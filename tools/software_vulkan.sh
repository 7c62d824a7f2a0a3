#!/usr/bin/env bash
# What it takes to compile llama.cpp's Vulkan backend on Debian or Ubuntu and to run it without a GPU: run as root.
#
#   tools/software_vulkan.sh DIR && export VULKAN_SDK=DIR
#
# Mesa's software device (lavapipe), glslc, SPIR-V headers and the Vulkan loader come from the system's own packages.
# ggml-vulkan.cpp needs Vulkan headers of 1.3.272 or newer (vk::LayerSettingEXT). Debian 12 has 1.3.239, so there
# DIR/include gets Debian 13's, headers alone; elsewhere DIR/include is a link to the system's.
set -euo pipefail

dir=${1:?usage: $0 DIR}
packages=(glslc spirv-headers libvulkan-dev mesa-vulkan-drivers)
wanted=272

version() { # the patch number of the headers in folder $1, 0 if there are none
    sed -n 's/^#define VK_HEADER_VERSION \([0-9]*\).*/\1/p' "$1/vulkan/vulkan_core.h" 2>/dev/null | grep . || echo 0
}

newer_headers() { # Debian 13's libvulkan-dev, unpacked and not installed
    local work source options
    work=$(mktemp -d)
    trap 'rm -rf "$work"' RETURN
    source=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Component: main' | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $source trixie main" > "$work/sources.list"
    mkdir -p "$work/lists/partial"
    options=(-o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$work/lists"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
    apt-get -qq "${options[@]}" update
    (cd "$work" && apt-get -qq "${options[@]}" download libvulkan-dev && dpkg-deb -x libvulkan-dev_*.deb .)
    cp -r "$work/usr/include" "$dir/"
}

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null)" = "install ok installed" ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends "${missing[@]}" > /dev/null
fi

mkdir -p "$dir"
[ "$(version "$dir/include")" -ge $wanted ] && exit
if [ "$(version /usr/include)" -ge $wanted ]; then
    ln -sfn /usr/include "$dir/include"
elif [ "$(. /etc/os-release && echo "$VERSION_CODENAME")" = bookworm ]; then
    newer_headers
else
    echo "error: the Vulkan headers here are 1.3.$(version /usr/include)" >&2
    echo "  why: llama.cpp's Vulkan backend needs 1.3.$wanted or newer" >&2
    echo "  fix: install newer ones (the Vulkan SDK) and point VULKAN_SDK at them" >&2
    exit 1
fi
