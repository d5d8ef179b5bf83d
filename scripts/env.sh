# Build environment of the engine, sourced by the Makefile's recipes and by hand: `. scripts/env.sh`.
# The C flags are part of Go's build cache key, so they are kept here, in one place.
# Without -march the CPU backend is plain SSE2 and ten times slower.
: "${HONE_MARCH:=native}"
export CGO_ENABLED=1
# ggml's own threads spin at every barrier: beside one busy process they are slower than a single thread. OpenMP's sleep.
export CGO_CFLAGS="-O3 -march=${HONE_MARCH} -fopenmp"
export CGO_CXXFLAGS="-O3 -march=${HONE_MARCH} -fopenmp"
export CGO_LDFLAGS="-fopenmp"
# Repacked matrix kernels for Q4_0 weights.
export CGO_CPPFLAGS="-DGGML_USE_CPU_REPACK -DGGML_USE_OPENMP"
# libtokenizers.a (daulet/tokenizers and llguidance) is found through LIBRARY_PATH and not CGO_LDFLAGS:
# an -L flag would be part of the cache key and recompile the engine for every directory name.
if [ -n "${HONE_NATIVE:-}" ]; then
	export LIBRARY_PATH="${HONE_NATIVE}${LIBRARY_PATH:+:$LIBRARY_PATH}"
fi
