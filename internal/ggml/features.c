// What the engine was compiled for, and whether this CPU has it. The whole program is compiled with the same flags
// (scripts/env.sh), so constructors of the engine's C++ globals, and even the start of Go's runtime, may hold instructions
// that another CPU does not have. Hence the check runs before them, as the first constructor of the executable.

#include "extensions.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <string.h>
#include <unistd.h>

enum { EAX, EBX, ECX, EDX };
enum { YMM = 6, ZMM = 0xe6, TILES = 0x60000 };

// 1 if the compiler defines the macro, as 1, for its flags; the text of one that is not defined is its name.
#define BUILT(macro) (sizeof TEXT_OF(macro) == sizeof "1")
#define TEXT_OF(expanded) TEXT(expanded)
#define TEXT(x) #x

// Bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID; AMD64 Architecture Programmer's
// Manual, volume 3, appendix E. Left out is what no compiler emits unasked and the engine does not ask for (AES, SHA,
// SSE4A, CLZERO and the like): code for a CPU that has them runs on one that lacks them.
static const struct hone_feature table[] = {
	{"pni", 1, 0, ECX, 0, 0, BUILT(__SSE3__)},
	{"ssse3", 1, 0, ECX, 9, 0, BUILT(__SSSE3__)},
	{"sse4_1", 1, 0, ECX, 19, 0, BUILT(__SSE4_1__)},
	{"sse4_2", 1, 0, ECX, 20, 0, BUILT(__SSE4_2__)},
	{"popcnt", 1, 0, ECX, 23, 0, BUILT(__POPCNT__)},
	{"movbe", 1, 0, ECX, 22, 0, BUILT(__MOVBE__)},
	{"abm", 0x80000001u, 0, ECX, 5, 0, BUILT(__LZCNT__)},
	{"bmi1", 7, 0, EBX, 3, 0, BUILT(__BMI__)},
	{"bmi2", 7, 0, EBX, 8, 0, BUILT(__BMI2__)},
	{"avx", 1, 0, ECX, 28, YMM, BUILT(__AVX__)},
	{"f16c", 1, 0, ECX, 29, YMM, BUILT(__F16C__)},
	{"fma", 1, 0, ECX, 12, YMM, BUILT(__FMA__)},
	{"fma4", 0x80000001u, 0, ECX, 16, YMM, BUILT(__FMA4__)},
	{"xop", 0x80000001u, 0, ECX, 11, YMM, BUILT(__XOP__)},
	{"tbm", 0x80000001u, 0, ECX, 21, 0, BUILT(__TBM__)},
	{"avx2", 7, 0, EBX, 5, YMM, BUILT(__AVX2__)},
	{"avx_vnni", 7, 1, EAX, 4, YMM, BUILT(__AVXVNNI__)},
	{"avx_ifma", 7, 1, EAX, 23, YMM, BUILT(__AVXIFMA__)},
	{"avx_vnni_int8", 7, 1, EDX, 4, YMM, BUILT(__AVXVNNIINT8__)},
	{"avx_vnni_int16", 7, 1, EDX, 10, YMM, BUILT(__AVXVNNIINT16__)},
	{"avx_ne_convert", 7, 1, EDX, 5, YMM, BUILT(__AVXNECONVERT__)},
	{"gfni", 7, 0, ECX, 8, 0, BUILT(__GFNI__)},
	{"avx512f", 7, 0, EBX, 16, ZMM, BUILT(__AVX512F__)},
	{"avx512cd", 7, 0, EBX, 28, ZMM, BUILT(__AVX512CD__)},
	{"avx512bw", 7, 0, EBX, 30, ZMM, BUILT(__AVX512BW__)},
	{"avx512dq", 7, 0, EBX, 17, ZMM, BUILT(__AVX512DQ__)},
	{"avx512vl", 7, 0, EBX, 31, ZMM, BUILT(__AVX512VL__)},
	{"avx512ifma", 7, 0, EBX, 21, ZMM, BUILT(__AVX512IFMA__)},
	{"avx512vbmi", 7, 0, ECX, 1, ZMM, BUILT(__AVX512VBMI__)},
	{"avx512_vbmi2", 7, 0, ECX, 6, ZMM, BUILT(__AVX512VBMI2__)},
	{"avx512_vnni", 7, 0, ECX, 11, ZMM, BUILT(__AVX512VNNI__)},
	{"avx512_bitalg", 7, 0, ECX, 12, ZMM, BUILT(__AVX512BITALG__)},
	{"avx512_vpopcntdq", 7, 0, ECX, 14, ZMM, BUILT(__AVX512VPOPCNTDQ__)},
	{"avx512_bf16", 7, 1, EAX, 5, ZMM, BUILT(__AVX512BF16__)},
	{"avx512_fp16", 7, 0, EDX, 23, ZMM, BUILT(__AVX512FP16__)},
	{"amx_tile", 7, 0, EDX, 24, TILES, BUILT(__AMX_TILE__)},
	{"amx_int8", 7, 0, EDX, 25, TILES, BUILT(__AMX_INT8__)},
	{"amx_bf16", 7, 0, EDX, 22, TILES, BUILT(__AMX_BF16__)},
};
enum { FEATURES = sizeof table / sizeof table[0] };

// What follows runs on CPUs that the file's own flags do not fit. Only macros of inline assembly are used in it, since an
// inline function of a header would be compiled with those flags.
#define ANY_CPU __attribute__((target("general-regs-only,no-bmi,no-bmi2,no-lzcnt,no-movbe,no-popcnt,no-tbm"), noinline))

ANY_CPU int hone_cpu_has(const struct hone_feature *f) {
	unsigned r[4];
	__cpuid(f->leaf & 0x80000000u, r[0], r[1], r[2], r[3]);
	if (r[EAX] < f->leaf) return 0;
	if (f->subleaf > 0) {
		__cpuid_count(f->leaf, 0, r[0], r[1], r[2], r[3]);
		if (r[EAX] < f->subleaf) return 0;
	}
	__cpuid_count(f->leaf, f->subleaf, r[0], r[1], r[2], r[3]);
	if (!(r[f->word] >> f->bit & 1)) return 0;
	if (f->state == 0) return 1;
	__cpuid(1, r[0], r[1], r[2], r[3]);
	if (!(r[ECX] >> 27 & 1)) return 0; // OSXSAVE: XGETBV can be executed
	unsigned low, high;
	__asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	return (low & f->state) == f->state;
}

ANY_CPU static void say(const char *text) {
	if (write(2, text, strlen(text)) < 0) _exit(1);
}

// 101 is the first priority that programs may use; the constructors of C++ globals come after all priorities.
__attribute__((constructor(101))) ANY_CPU static void check_cpu(void) {
	int missing = 0;
	for (int i = 0; i < FEATURES; i++) {
		if (!table[i].built || hone_cpu_has(&table[i])) continue;
		say(missing++ == 0 ? "hone: this program was built for a CPU with instructions that this one does not have: " : ", ");
		say(table[i].name);
	}
	if (missing == 0) return;
	say("\nBuild it on this machine with `make build`, or for every x86-64 CPU since 2013 with `make build HONE_MARCH=x86-64-v3`.\n");
	_exit(1);
}

#else

// Other architectures: the features that the engine has code of its own for, by their names in /proc/cpuinfo (arm64). What
// the CPU has is for the reader of /proc/cpuinfo; nothing is checked at the start.
static const struct hone_feature table[] = {
#ifdef __ARM_FEATURE_DOTPROD
	{"asimddp", 0, 0, 0, 0, 0, 1},
#endif
#ifdef __ARM_FEATURE_FP16_VECTOR_ARITHMETIC
	{"asimdhp", 0, 0, 0, 0, 0, 1},
#endif
#ifdef __ARM_FEATURE_MATMUL_INT8
	{"i8mm", 0, 0, 0, 0, 0, 1},
#endif
#ifdef __ARM_FEATURE_SVE
	{"sve", 0, 0, 0, 0, 0, 1},
#endif
	{0},
};
enum { FEATURES = sizeof table / sizeof table[0] - 1 };

int hone_cpu_has(const struct hone_feature *f) {
	(void)f;
	return 1;
}

#endif

int hone_features(const struct hone_feature **features) {
	*features = table;
	return FEATURES;
}

int hone_built_with_openmp(void) {
#if defined(_OPENMP) && defined(GGML_USE_OPENMP)
	return 1;
#else
	return 0;
#endif
}

int hone_built_with_repack(void) {
#ifdef GGML_USE_CPU_REPACK
	return 1;
#else
	return 0;
#endif
}
