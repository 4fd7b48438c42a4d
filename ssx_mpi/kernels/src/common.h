/* Shared by the compiled loops: nothing here allocates, and no loop keeps state between calls. */
#ifndef SSX_MPI_COMMON_H
#define SSX_MPI_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Where the linker can choose at load time, the wider instructions serve the machines that have them; without fused
 * multiplications the results are the same. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* Clones of a function that calls it have their own copy, with their instructions */
#define INLINED static inline __attribute__((always_inline))

#endif
