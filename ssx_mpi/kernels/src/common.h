/* Shared by the compiled loops: nothing here allocates, and no loop keeps state between calls. */
#ifndef SSX_MPI_COMMON_H
#define SSX_MPI_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#endif
