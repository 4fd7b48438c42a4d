#include "common.h"

/* Version of the interface between the C loops and their Python callers, checked by a test. */
int ssx_mpi_loops_version(void) { return 1; }
