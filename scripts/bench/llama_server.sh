#!/usr/bin/env bash
# Builds llama-server and llama-quantize, the peers of `make bench-serve`, and prints their directory. Their source is the
# llama.cpp inside the source distribution of llama-cpp-python, the newest one that an ordinary package client gets.
#
#   scripts/bench/llama_server.sh PYTHON DIRECTORY    PYTHON is a virtual environment's, with pip
set -euo pipefail
version=0.3.36
python=$1 directory=$2
mkdir -p "$directory"
directory=$(cd "$directory" && pwd)
if [ ! -x "$directory/build/bin/llama-server" ]; then
	{
		"$python" -m pip install --quiet scikit-build-core
		cd "$directory"
		[ -f "llama_cpp_python-$version.tar.gz" ] ||
			"$python" -m pip download --quiet --no-deps --no-binary :all: --no-build-isolation "llama-cpp-python==$version"
		tar xzf "llama_cpp_python-$version.tar.gz"
		cmake -S "llama_cpp_python-$version/vendor/llama.cpp" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
			-DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF ${LLAMA_CMAKE:-}
		cmake --build build --target llama-server llama-quantize --parallel "$(nproc)"
	} >&2
fi
echo "$directory/build/bin"
