#!/usr/bin/env bash
# Builds libtokenizers.a, the Rust half of the engine, and prints the directory that holds it; nothing else goes to
# standard output:
#
#     export HONE_NATIVE=$(scripts/native.sh); . scripts/env.sh
#
# The archive holds two C APIs: daulet/tokenizers (tokenizer.json) and llguidance (constraints; llguidance.h lies beside
# the archive). It is kept outside the tree, under a name made of everything that it is built from, so that it is built
# once (about 3 minutes on 2 cores) and again only when one of its inputs changes.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
need_minor=87 # llguidance 1.9 needs Rust 1.87

say() { printf '%s\n' "$*" >&2; }
die() { say "native.sh: $*"; exit 1; }

install_rust="install it with:  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
and open a new shell, or put \$HOME/.cargo/bin on PATH."

# rustup puts cargo where a non-login shell does not look.
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
	PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi
command -v go >/dev/null 2>&1 || die "go is not installed, and the sources of libtokenizers.a come from a Go module. See https://go.dev/dl/"
for tool in cargo rustc; do
	command -v "$tool" >/dev/null 2>&1 ||
		die "$tool is not installed. The tokenizer and constraint library (libtokenizers.a) is built from Rust, 1.$need_minor or newer;
$install_rust"
done
command -v cc >/dev/null 2>&1 ||
	die "cc is not installed. Rust links its build scripts with it; on Debian or Ubuntu: apt-get install build-essential"

rustc_version=$(rustc --version)
minor=$(printf '%s\n' "$rustc_version" | sed -n 's/^rustc 1\.\([0-9]*\)\..*/\1/p')
if [ -n "$minor" ] && [ "$minor" -lt "$need_minor" ]; then
	die "$rustc_version is too old: llguidance, in libtokenizers.a, needs Rust 1.$need_minor or newer. With rustup: rustup update stable. Else
$install_rust"
fi

module=github.com/daulet/tokenizers
cd "$here/.."
module_version=$(go list -m -f '{{.Version}}' "$module")
module_dir=$(go list -m -f '{{.Dir}}' "$module")
if [ -z "$module_dir" ]; then
	say "native.sh: downloading $module $module_version"
	go mod download "$module" >&2
	module_dir=$(go list -m -f '{{.Dir}}' "$module")
fi

digest() { if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi | cut -d' ' -f1; }
key=$({
	cat "$here/native.sh" "$here/native/Cargo.toml" "$here/native/Cargo.lock" "$module_dir/src/lib.rs"
	printf '%s\n' "$rustc_version" "$(rustc -vV | sed -n 's/^host: //p')" "$module_version"
} | digest)

cache="${XDG_CACHE_HOME:-$HOME/.cache}/hone/native"
out="$cache/$key"
if [ -f "$out/libtokenizers.a" ]; then
	printf '%s\n' "$out"
	exit 0
fi

mkdir -p "$cache"
# Two makes at once: the second waits and then finds the first one's work. The lock goes with the process, so an
# interrupted build leaves none. Without flock (util-linux), both build, and the last rename wins with the same content.
if command -v flock >/dev/null 2>&1; then
	exec 9>"$cache/lock"
	flock -n 9 || { say "native.sh: another build of libtokenizers.a is running; waiting for it"; flock 9; }
	if [ -f "$out/libtokenizers.a" ]; then
		printf '%s\n' "$out"
		exit 0
	fi
fi

build=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$build"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "native.sh: building libtokenizers.a (about 3 minutes, once)"
mkdir -p "$build/src" "$build/out"
cp "$here/native/Cargo.toml" "$here/native/Cargo.lock" "$build/"
{
	cat "$module_dir/src/lib.rs"
	printf '\n// Keeps the C API of llguidance in the archive.\npub use llguidance::ffi::*;\n'
} >"$build/src/lib.rs"

# 9>&-: cargo must not hold the lock when this script is killed. --locked: what is built is what Cargo.lock says.
# Progress goes to standard error.
# fetch: build alone leaves out crates of other platforms, and metadata (below) wants them all.
(cd "$build" && cargo fetch --locked >&2 9>&- && CARGO_TARGET_DIR="$build/target" cargo build --release --locked >&2 9>&-) ||
	die "cargo could not build libtokenizers.a; its messages are above. It downloads crates: is the network reachable?"

llguidance_dir=$(cd "$build" && cargo metadata --locked --offline --format-version 1 9>&- |
	grep -o '"manifest_path":"[^"]*/llguidance-[^"]*/Cargo.toml"' | head -n 1 | sed 's/^"manifest_path":"//; s|/Cargo.toml"$||')
[ -f "$llguidance_dir/llguidance.h" ] || die "the llguidance crate has no llguidance.h at $llguidance_dir"
cp "$build/target/release/libtokenizers.a" "$build/out/"
cp "$llguidance_dir/llguidance.h" "$module_dir/tokenizers.h" "$build/out/"
chmod 644 "$build/out/"*
sync "$build/out/"* 2>/dev/null || true

if ! mv -T "$build/out" "$out" 2>/dev/null; then
	# No flock, and another build was first; or no mv -T.
	[ -f "$out/libtokenizers.a" ] || mv "$build/out" "$out"
fi
printf '%s\n' "$out"
