#ifndef HONE_EXTENSIONS_H
#define HONE_EXTENSIONS_H

// An instruction set extension that the compiler, or an intrinsic, puts into the engine's code on its own.
struct hone_feature {
	const char *name;        // in the flags of /proc/cpuinfo
	unsigned leaf, subleaf;  // of CPUID
	int word, bit;           // word 0 to 3: EAX, EBX, ECX, EDX
	unsigned state;          // bits of XCR0: registers that the operating system must save
	int built;               // whether the engine's compiler flags allow it
};

int hone_features(const struct hone_feature **features);
int hone_cpu_has(const struct hone_feature *feature);
int hone_built_with_openmp(void);
int hone_built_with_repack(void);

#endif
