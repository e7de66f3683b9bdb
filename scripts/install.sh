#!/bin/sh
# Installs what is missing: scripts/install.sh build|test. Prints the package command, runs it as root or with
# passwordless sudo, and otherwise says the one line to type.
set -eu

case "${1:-build}" in
build) packages="gcc make libc6-dev libcjson-dev zlib1g-dev libopenblas-openmp-dev libstb-dev
                libjpeg-dev" ;;
test) packages="gcc make libc6-dev libcjson-dev zlib1g-dev libopenblas-openmp-dev libstb-dev
                libjpeg-dev libcmocka-dev jq clang libclang-rt-14-dev clang-format libopenmpi-dev openmpi-bin
                slurm-wlm munge" ;;
*) echo "usage: $0 build|test" >&2; exit 2 ;;
esac

command -v dpkg-query >/dev/null || exit 0 # not Debian or Ubuntu: the build says what it lacks
missing=""
for package in $packages; do
    # libclang-rt-14-dev is Debian 12's name for clang's run-time libraries; others bring them with clang
    case $package in libclang-rt-*) apt-cache show "$package" >/dev/null 2>&1 || continue ;; esac
    status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
    [ "$status" = "install ok installed" ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

line="apt-get update && apt-get install -y --no-install-recommends$missing"
echo "missing packages; installing them with: $line"
if [ "$(id -u)" = 0 ]; then root=""
elif sudo -n true 2>/dev/null; then root="sudo"
else
    echo "please type this line, then try again:  sudo sh -c '$line'" >&2
    exit 1
fi
$root env DEBIAN_FRONTEND=noninteractive sh -c "$line" >/dev/null
rm -f build/config.mk # what was found before
