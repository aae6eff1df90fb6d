#!/bin/sh
# Unpacks this bundle and runs its test matrix on this machine; --help tells the options.
# The report goes to $OUT if that is set, else beside this script. Needs tar and xz, and no toolchain.
# Exit code: 0 every row PASS; 1 a row FAIL; 2 no row FAIL, but some SKIPPED; 64 wrong usage.
set -u

here=$(cd "$(dirname "$0")" && pwd) || exit 1
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
tar -xJf "$here/bundle.tar.xz" -C "$folder" || exit 1
"$folder/bin/xtask" run-bundle --folder "$folder" --beside "$here" "$@"
